//! Parts of the disk, which only the guest knows: it names them and the host makes them fail.

use crate::server::Server;

/// Sectors with a name.
pub(crate) struct Area {
    pub(crate) name: String,
    pub(crate) ranges: Vec<(u64, u64)>,
}

impl Area {
    /// From the guest's `NAME A-B A-B …`.
    pub(crate) fn parse(line: &str) -> Area {
        let mut words = line.split_whitespace();
        let name = words.next().expect("an area has a name").to_owned();
        let range = |word: &str| {
            let (start, end) = word.split_once('-').expect("a range is A-B");
            (start.parse().expect("a sector"), end.parse().expect("a sector"))
        };
        let ranges: Vec<_> = words.map(range).collect();
        assert!(!ranges.is_empty(), "the guest found no {name}: {line}");
        Area { name, ranges }
    }

    pub(crate) fn contains(&self, sector: u64) -> bool {
        self.ranges.iter().any(|(start, end)| (*start..=*end).contains(&sector))
    }

    /// Make device operations on it fail, one rule a range.
    pub(crate) fn fault(&self, server: &Server, words: &[&str]) {
        let ranges: Vec<_> = self.ranges.iter().map(|(start, end)| format!("{start}-{end}")).collect();
        let sectors = ranges.iter().flat_map(|range| ["--sectors", range]);
        server.fault(&words.iter().copied().chain(sectors).collect::<Vec<_>>());
    }
}
