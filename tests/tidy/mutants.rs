//! The mutants of `ci/mutants` can be made: what each takes out of the code is there, once.

use std::collections::BTreeSet;
use std::fs;

use crate::{Findings, PROMISES, root};

const LIST: &str = "tests/mutants/list";

/// An entry of the list, which says at its top what each line means.
#[derive(Debug, Default)]
struct Mutant {
    line: usize,
    name: String,
    file: String,
    gone: String,
    from: Vec<String>,
    to: Vec<String>,
}

fn parse(list: &str) -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    for (line, text) in list.lines().enumerate().filter(|(_, text)| !text.is_empty() && !text.starts_with('#')) {
        if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            mutants.push(Mutant { line, name: name.to_owned(), ..Mutant::default() });
            continue;
        }
        let mutant = mutants.last_mut().unwrap_or_else(|| panic!("{LIST}:{}: belongs to no mutant", line + 1));
        match (text.split_at(1), text.strip_prefix("in ")) {
            (("-", from), _) => mutant.from.push(from.to_owned()),
            (("+", to), _) => mutant.to.push(to.to_owned()),
            (_, Some(file)) => mutant.file = file.to_owned(),
            _ if text.starts_with("equivalent: ") => {}
            _ => mutant.gone = text.to_owned(),
        }
    }
    mutants
}

#[test]
fn what_a_mutant_takes_away_is_there_once() {
    let list = fs::read_to_string(root().join(LIST)).expect("the list of mutants is there");
    let mut findings = Findings::default();
    let mut names = BTreeSet::new();
    for mutant in parse(&list) {
        let mut find = |what: String| findings.add(LIST, mutant.line, format!("{}: {what}", mutant.name));
        if !names.insert(mutant.name.clone()) {
            find("there are two of that name".to_owned());
        }
        let promises = mutant.gone.split(':').next().unwrap_or_default();
        if !promises.split(", ").all(|promise| PROMISES.contains(&promise)) {
            find(format!("`{}` does not begin with promises", mutant.gone));
        }
        let Ok(text) = fs::read_to_string(root().join(&mutant.file)) else {
            find(format!("there is no file `{}`", mutant.file));
            continue;
        };
        let (from, to) = (mutant.from.join("\n"), mutant.to.join("\n"));
        let count = text.matches(&from).count();
        if from.is_empty() || from == to || count != 1 {
            find(format!("what is to be changed stands {count} times in {}", mutant.file));
        }
    }
    findings.none("mutants that cannot be made; see the top of the list");
}
