//! When a scanner pass may go on: days of the week and times of the day.

use std::fmt;
use std::str::FromStr;

const SECONDS_A_DAY: u64 = 86_400;
const MINUTES_A_DAY: u32 = 1440;
const MINUTES_A_WEEK: u64 = 7 * MINUTES_A_DAY as u64;
/// In the order of the days since 1970-01-05, a Monday.
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// 1970-01-01 was a Thursday.
const DAY_OF_THE_EPOCH: u64 = 3;

/// Times of the week. One that ends where it begins lasts a day; one that ends earlier ends on the next day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// A bit for each day on which it begins, Monday's the lowest.
    days: u8,
    /// Minutes of the day.
    begin: u32,
    end: u32,
}

impl Default for Window {
    /// Always.
    fn default() -> Window {
        Window { days: 0x7f, begin: 0, end: 0 }
    }
}

impl Window {
    /// Whether it is open at `local` seconds since 1970 by the clock on the wall.
    pub fn is_open(&self, local: u64) -> bool {
        let (day, minute) = (local / SECONDS_A_DAY + DAY_OF_THE_EPOCH, minute_of(local));
        let begins = |day: u64| self.days >> (day % 7) & 1 == 1;
        if self.begin < self.end {
            begins(day) && (self.begin..self.end).contains(&minute)
        } else {
            (begins(day) && minute >= self.begin) || (begins(day + 6) && minute < self.end)
        }
    }

    /// Of so many seconds, those in which it is open.
    pub fn open_of(&self, seconds: u64) -> u64 {
        let a_day = if self.begin < self.end { self.end - self.begin } else { MINUTES_A_DAY + self.end - self.begin };
        let minutes = u64::from(a_day) * u64::from(self.days.count_ones());
        seconds / MINUTES_A_WEEK * minutes + seconds % MINUTES_A_WEEK * minutes / MINUTES_A_WEEK
    }

    /// Seconds from `local` until it may be another: at most a minute, which is as exact as it is said.
    pub fn until_next_minute(local: u64) -> u64 {
        60 - local % 60
    }
}

fn minute_of(local: u64) -> u32 {
    u32::try_from(local % SECONDS_A_DAY / 60).expect("less than a day")
}

fn day(text: &str) -> Option<usize> {
    DAYS.iter().position(|day| text.eq_ignore_ascii_case(day))
}

fn days(text: &str) -> Option<u8> {
    let mut mask = 0;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let mut next = first;
        loop {
            mask |= 1 << next;
            if next == last {
                break;
            }
            next = (next + 1) % 7;
        }
    }
    Some(mask)
}

fn minute(text: &str) -> Option<u32> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| text.parse::<u32>().ok().filter(|_| text.len() == 2);
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    (minutes < 60 && hours * 60 + minutes <= MINUTES_A_DAY).then_some((hours * 60 + minutes) % MINUTES_A_DAY)
}

impl FromStr for Window {
    type Err = String;

    /// `22:00-06:00`, `sat,sun` or `mon-fri 22:00-06:00`.
    fn from_str(text: &str) -> Result<Window, String> {
        let parse = || {
            let words: Vec<&str> = text.split_whitespace().collect();
            let times = |text: &str| text.split_once('-').and_then(|(a, b)| Some((minute(a)?, minute(b)?)));
            let (days, (begin, end)) = match *words.as_slice() {
                [one] => match times(one) {
                    Some(times) => (0x7f, times),
                    None => (days(one)?, (0, 0)),
                },
                [first, second] => (days(first)?, times(second)?),
                _ => return None,
            };
            Some(Window { days, begin, end })
        };
        parse().ok_or_else(|| format!("{text:?} is no window such as 22:00-06:00, sat,sun or 'mon-fri 22:00-06:00'"))
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Window::default() {
            return f.write_str("always");
        }
        let names: Vec<&str> = (0..7).filter(|day| self.days >> day & 1 == 1).map(|day| DAYS[day]).collect();
        let time = |minutes: u32| format!("{:02}:{:02}", minutes / 60, minutes % 60);
        match self.days {
            0x7f => {}
            _ => write!(f, "{} ", names.join(","))?,
        }
        write!(f, "{}-{}", time(self.begin), time(self.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-30 was a Monday.
    const MONDAY: u64 = 1_795_996_800;

    #[test]
    fn a_window_is_open_on_its_days_and_between_its_times() {
        let at = |day: u64, hour: u64, minute: u64| MONDAY + day * SECONDS_A_DAY + hour * 3600 + minute * 60;
        let open = |text: &str, time| text.parse::<Window>().unwrap().is_open(time);
        assert!(Window::default().is_open(0) && Window::default().is_open(at(6, 23, 59)));
        assert!(open("08:30-17:00", at(0, 8, 30)) && !open("08:30-17:00", at(0, 8, 29)));
        assert!(!open("08:30-17:00", at(0, 17, 0)));
        for (time, expected) in
            [(at(0, 21, 59), false), (at(0, 22, 0), true), (at(1, 5, 59), true), (at(1, 6, 0), false)]
        {
            assert_eq!(open("mon 22:00-06:00", time), expected, "{time}");
        }
        // The night before Monday belongs to Sunday.
        assert!(!open("mon-fri 22:00-06:00", at(0, 5, 0)) && open("sun 22:00-06:00", at(0, 5, 0)));
        assert!(open("sat,sun", at(5, 0, 0)) && open("sat,sun", at(6, 23, 59)) && !open("sat,sun", at(0, 0, 0)));
        assert!(open("fri-mon", at(0, 12, 0)) && !open("fri-mon", at(1, 12, 0)));
        assert!(open("00:00-24:00", at(2, 23, 59)) && open("20:00-24:00", at(2, 23, 59)));
        assert!(!open("20:00-24:00", at(2, 0, 0)));
    }

    #[test]
    fn of_a_time_a_window_is_open_for_its_share() {
        let open_of = |text: &str, seconds| text.parse::<Window>().unwrap().open_of(seconds);
        assert_eq!((Window::default().open_of(7), Window::default().open_of(1_209_601)), (7, 1_209_601));
        assert_eq!((open_of("22:00-06:00", 86_400), open_of("06:00-22:00", 86_400)), (28_800, 57_600));
        assert_eq!((open_of("sat,sun", 604_800), open_of("sun 12:00-12:30", 604_800)), (172_800, 1800));
    }

    #[test]
    fn what_is_no_window_is_refused() {
        for text in ["", "25:00-26:00", "8:00-9:00", "mon-", "foo", "mon 1-2", "22:00", "mon tue", "22:60-23:00"] {
            let error = text.parse::<Window>().unwrap_err();
            assert!(error.contains("no window"), "{error}");
        }
        assert_eq!("Mon-Wed 22:00-06:00".parse::<Window>().unwrap().to_string(), "mon,tue,wed 22:00-06:00");
        assert_eq!("00:00-24:00".parse::<Window>().unwrap().to_string(), "always");
    }
}
