//! How fast the slots are used up, by least squares over the daily samples, with the interval in which the truth
//! lies 19 times out of 20; or that nobody can say.
//!
//! Samples that follow each other are not independent: what was used yesterday is used today. The interval therefore
//! goes by the number of independent samples that the residuals' correlation with the day before leaves, n (1 − r) /
//! (1 + r) (Santer and others 2000, <https://doi.org/10.1029/1999JD901105>).

use super::history::Day;

/// Samples below which nothing is said.
pub const SAMPLES_MIN: usize = 8;
/// Days from the first sample to the last below which nothing is said.
pub const SPAN_DAYS_MIN: u64 = 14;
/// How sure the interval is, in percent.
pub const CONFIDENCE_PERCENT: u32 = 95;
/// Samples older than that do not count: the trend is one of now.
const WINDOW_DAYS: u64 = 70;

/// Two-sided 95 % quantiles of Student's distribution for 1 to 30 degrees of freedom.
const STUDENT: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// What the samples say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trend {
    /// Samples that were used.
    pub samples: usize,
    /// Days from the first of them to the last.
    pub span_days: u64,
    /// The slope, where there is enough data for one.
    pub slope: Option<Slope>,
}

/// Slots used up a day.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// The best guess.
    pub per_day: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// When the slots that are free will be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exhaustion {
    /// Days from now, by the best guess.
    pub days: f64,
    /// Days from now, at the earliest.
    pub earliest: f64,
    /// Days from now, at the latest.
    pub latest: f64,
}

impl Slope {
    /// When `free` slots will be used; nothing where the growth cannot be told from none.
    pub fn exhaustion(&self, free: u64) -> Option<Exhaustion> {
        let free = free as f64;
        (self.low > 0.0).then(|| Exhaustion {
            days: free / self.per_day,
            earliest: free / self.high,
            latest: free / self.low,
        })
    }
}

/// What the days up to `today` say.
pub fn trend(days: &[Day], today: u64) -> Trend {
    let recent: Vec<(f64, f64)> = days
        .iter()
        .filter(|day| day.day <= today && today - day.day < WINDOW_DAYS)
        .map(|day| (day.day as f64, day.used as f64))
        .collect();
    let span = match (recent.first(), recent.last()) {
        (Some(first), Some(last)) => last.0 - first.0,
        _ => 0.0,
    };
    let enough = recent.len() >= SAMPLES_MIN && span >= SPAN_DAYS_MIN as f64;
    Trend { samples: recent.len(), span_days: span as u64, slope: if enough { slope(&recent) } else { None } }
}

/// Least squares; nothing where too few independent samples are left.
fn slope(points: &[(f64, f64)]) -> Option<Slope> {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x_mean, y_mean) = (mean(|p| p.0), mean(|p| p.1));
    let sxx: f64 = points.iter().map(|(x, _)| (x - x_mean) * (x - x_mean)).sum();
    let sxy: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let per_day = sxy / sxx;
    let residuals: Vec<f64> = points.iter().map(|(x, y)| y - y_mean - per_day * (x - x_mean)).collect();
    let squares: f64 = residuals.iter().map(|e| e * e).sum();
    // Below what rounding makes of numbers of this size, the points lie on the line.
    if squares <= 1e-9 * (1.0 + y_mean * y_mean) {
        return Some(Slope { per_day, low: per_day, high: per_day });
    }
    let neighbours: f64 = residuals.windows(2).map(|pair| pair[0] * pair[1]).sum();
    let correlation = (neighbours / squares).clamp(0.0, 0.99);
    let independent = n * (1.0 - correlation) / (1.0 + correlation);
    let freedom = independent - 2.0;
    if freedom < 1.0 {
        return None;
    }
    let error = (squares / freedom / sxx).sqrt();
    let quantile = STUDENT[(freedom as usize).clamp(1, STUDENT.len()) - 1];
    Some(Slope { per_day, low: per_day - quantile * error, high: per_day + quantile * error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days(used: impl IntoIterator<Item = (u64, u64)>) -> Vec<Day> {
        used.into_iter().map(|(day, used)| Day { day, used, ..Day::default() }).collect()
    }

    #[test]
    fn a_line_is_found_with_no_doubt_and_few_samples_say_nothing() {
        let line = days((0..15).map(|day| (100 + day, 10 + 3 * day)));
        let found = trend(&line, 114);
        assert_eq!((found.samples, found.span_days), (15, 14));
        let slope = found.slope.unwrap();
        assert!((slope.per_day - 3.0).abs() < 1e-9 && slope.low == slope.high, "{slope:?}");
        let exhaustion = slope.exhaustion(300).unwrap();
        assert!((exhaustion.days - 100.0).abs() < 1e-6, "{exhaustion:?}");
        // A day less in span, or too few samples in the span.
        assert_eq!(trend(&line[..14], 113).slope, None);
        let sparse = days((0..7).map(|week| (100 + 7 * week, week)));
        assert_eq!(trend(&sparse, 142), Trend { samples: 7, span_days: 42, slope: None });
        assert_eq!(trend(&[], 5), Trend { samples: 0, span_days: 0, slope: None });
    }

    #[test]
    fn noise_widens_the_interval_by_the_textbook() {
        // Residuals of ±1 in turn: their correlation is negative, so all samples count.
        let noisy = days((0..20).map(|day| (day, 100 + 2 * day + day % 2)));
        let slope = trend(&noisy, 19).slope.unwrap();
        // By hand: sxx = 665, sxy = 1335, 18 degrees of freedom, t = 2.101.
        let squares: f64 = 20.0 * 0.25 - 665.0 * (1335.0_f64 / 665.0 - 2.0).powi(2);
        let half = 2.101 * (squares / 18.0 / 665.0).sqrt();
        assert!((slope.per_day - 1335.0 / 665.0).abs() < 1e-9, "{slope:?}");
        assert!((slope.high - slope.per_day - half).abs() < 1e-9, "{slope:?} {half}");
        assert!((slope.per_day - slope.low - half).abs() < 1e-9, "{slope:?} {half}");
    }

    #[test]
    fn days_that_depend_on_each_other_count_less() {
        // One step in the middle: a straight line through it is no trend to rely on.
        let step = days((0..20).map(|day| (day, if day < 10 { 0 } else { 100 })));
        let alone = days((0..20).map(|day| (day, if day % 2 == 0 { 5 * day } else { 5 * day + 20 })));
        let width = |days: &[Day]| trend(days, 19).slope.map(|slope| slope.high - slope.low);
        assert!(width(&step).is_none_or(|step| step > 4.0 * width(&alone).unwrap()), "{:?}", width(&step));
    }

    #[test]
    fn no_growth_is_no_end() {
        let still = days((0..30).map(|day| (day, 7)));
        let slope = trend(&still, 29).slope.unwrap();
        assert_eq!((slope.per_day, slope.exhaustion(100)), (0.0, None));
        let shrinking = days((0..30).map(|day| (day, 60 - day)));
        assert_eq!(trend(&shrinking, 29).slope.unwrap().exhaustion(100), None);
        // Growth that may be chance.
        let unsure = days((0..16).map(|day| (day, [5, 9, 4, 8, 6, 9, 4, 7][(day % 8) as usize])));
        assert_eq!(trend(&unsure, 15).slope.unwrap().exhaustion(100), None);
    }

    #[test]
    fn old_days_do_not_count() {
        let old = (0..30).map(|day| (day, 1000 * day));
        let new = (100..120).map(|day| (day, 30_000 + day));
        let slope = trend(&days(old.chain(new)), 119).slope.unwrap();
        assert!((slope.per_day - 1.0).abs() < 1e-9, "{slope:?}");
    }
}
