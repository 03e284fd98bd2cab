//! The figures of a benchmark, from what the guest stated and what QEMU saw.

use std::collections::BTreeMap;

use qemu_tests::bench::{Asked, Timed};
use qemu_tests::protocol::{Check, Value};
use serde_json::{Value as Json, json};

use super::draft::{self, Draft};
use super::targets::{OPERATIONS, RATIOS, Target};

/// One line: a target and what was found.
pub(super) struct Figure {
    pub(super) target: &'static Target,
    pub(super) found: Found,
    /// Requests and kicks of one operation, where they were counted.
    pub(super) asked: Option<(f64, f64)>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    /// Instructions of one operation, the mean over so many.
    Instructions { mean: f64, samples: u64 },
    /// Those that an IOMMU adds to one: the means with one and without.
    Added { with: f64, without: f64, samples: u64 },
    /// Instructions of one operation that passes through several layers, the mean over so many: those of each, the first
    /// called first, and those of devices in software, which count for nobody.
    Layers { own: Vec<(String, f64)>, devices: f64, samples: u64 },
    /// A number of another kind.
    Ratio(f64),
    /// Nothing, and why.
    NotMeasured(String),
}

impl Found {
    /// The number, if there is one.
    pub(super) fn number(&self) -> Option<f64> {
        match self {
            Self::Instructions { mean: number, .. } | Self::Ratio(number) => Some(*number),
            Self::Added { with, without, .. } => Some(with - without),
            Self::Layers { own, .. } => Some(own.iter().map(|(_, mean)| mean).sum()),
            Self::NotMeasured(_) => None,
        }
    }
}

impl Figure {
    /// What is worse than the target. `None` where nothing was found or there is no target.
    pub(super) fn misses(&self) -> Option<Vec<&'static str>> {
        let number = self.found.number()?;
        let Target { limit, requests, kicks, .. } = *self.target;
        let asked = self.asked.unwrap_or_default();
        let over = |found: f64, limit: Option<f64>, what| {
            limit.is_some_and(|limit| found > limit + 1e-9).then_some(what)
        };
        let counted = self.asked.is_some();
        limit?;
        let misses = [
            over(number, limit, "figure"),
            over(asked.0, requests.filter(|_| counted), "requests"),
            over(asked.1, kicks.filter(|_| counted), "kicks"),
        ];
        Some(misses.into_iter().flatten().collect())
    }
}

/// What the runs gave.
pub(super) struct Runs {
    pub(super) timed: Vec<Timed>,
    /// The rows of the machine without an IOMMU.
    pub(super) direct: Vec<Timed>,
    /// All that the timed guest stated.
    pub(super) values: Vec<Value>,
    pub(super) checks: Vec<Check>,
    pub(super) asked: Vec<Asked>,
    pub(super) draft: Draft,
}

/// The row of four CPUs.
const SMP: &str = "smp4";

/// What the names begin with of figures that are a difference, and of the rows that they are one of.
const ADDED: (&str, &str) = ("blk_added_", "blk_");

/// Every figure in the order of the targets.
pub(super) fn figures(runs: &Runs) -> Vec<Figure> {
    let timed: BTreeMap<_, _> = runs.timed.iter().map(|timed| (timed.name.as_str(), timed)).collect();
    let direct: BTreeMap<_, _> = runs.direct.iter().map(|timed| (timed.name.as_str(), timed)).collect();
    let mean_of = |timed: &Timed| timed.instructions as f64 / timed.operations as f64;
    let mean = |name: &str| timed.get(name).map(|timed| mean_of(timed));
    let operation = |target: &'static Target| {
        // A figure of what is added goes by the row's name in the runs, where both are whole.
        let added = target.name.strip_prefix(ADDED.0).map(|rest| format!("{}{rest}", ADDED.1));
        let row = added.as_deref().unwrap_or(target.name);
        let found = match (timed.get(row), direct.get(row)) {
            (Some(one), None) if added.is_none() => {
                Found::Instructions { mean: mean_of(one), samples: one.operations }
            }
            (Some(with), Some(without)) if added.is_some() => {
                let samples = with.operations.min(without.operations);
                Found::Added { with: mean_of(with), without: mean_of(without), samples }
            }
            _ => Found::NotMeasured(reason(&runs.checks, target.name)),
        };
        let asked = runs.asked.iter().find(|asked| asked.name == row);
        let each = |asked: &Asked, count: u64| count as f64 / asked.operations as f64;
        let asked = asked.map(|asked| (each(asked, asked.requests), each(asked, asked.counts.kicks)));
        Figure { target, found, asked }
    };
    let smp = |count: fn(&Asked) -> u64| {
        let four = runs.asked.iter().find(|asked| asked.name == SMP);
        four.map(|four| count(four) as f64 / four.operations as f64)
    };
    let ratio = |target: &'static Target| {
        let number = match target.name {
            "smp4_requests_per_op" => smp(|four| four.requests),
            "smp4_kicks_per_op" => smp(|four| four.counts.kicks),
            "growth" => {
                let all = mean("map_unmap_4k_strict_live_1m").zip(mean("map_unmap_4k_strict_live_1k"));
                all.map(|(million, thousand)| million / thousand)
            }
            "driver_bytes_per_live_mapping" => {
                let heap = runs.values.iter().find(|value| value.name == "map_unmap_4k_strict_live_1m.heap");
                heap.map(|heap| heap.number as f64 / 1e6)
            }
            _ => {
                let sum = |count: fn(&Asked) -> u64| runs.asked.iter().map(count).sum::<u64>();
                let kicks = sum(|asked| asked.counts.kicks);
                (kicks > 0).then(|| sum(|asked| asked.accesses) as f64 / kicks as f64)
            }
        };
        let row = if target.name.starts_with(SMP) { SMP } else { "map_unmap_4k_strict_live_1m" };
        let none = || Found::NotMeasured(reason(&runs.checks, row));
        Figure { target, found: number.map_or_else(none, Found::Ratio), asked: None }
    };
    let standard = OPERATIONS.iter().map(operation).chain(RATIOS.iter().map(ratio));
    standard.chain(draft::figures(&runs.draft)).collect()
}

/// Why there is no figure: what the guest says of the row with the longest name that the figure's begins with.
pub(super) fn reason(checks: &[Check], name: &str) -> String {
    let rows = checks.iter().filter(|check| name.starts_with(&check.name));
    let row = rows.max_by_key(|check| check.name.len());
    let said = row.and_then(|row| row.detail.strip_prefix("not measured: "));
    said.unwrap_or("there is no such row yet").to_owned()
}

/// The figures as a file.
pub(super) fn json(figures: &[Figure], qemu: &str, arch: &str) -> Json {
    let result = |figure: &Figure| {
        let name = figure.target.name;
        let mut result = match &figure.found {
            Found::Instructions { mean, samples } => {
                json!({ "name": name, "guest_instructions": rounded(*mean), "samples": samples })
            }
            Found::Added { with, without, samples } => json!({
                "name": name,
                "guest_instructions": rounded(with - without),
                "with_iommu": rounded(*with),
                "without_iommu": rounded(*without),
                "samples": samples,
            }),
            Found::Layers { own, devices, samples } => {
                let layers: Vec<_> = own
                    .iter()
                    .map(|(layer, mean)| json!({ "layer": layer, "guest_instructions": rounded(*mean) }))
                    .collect();
                json!({
                    "name": name,
                    "guest_instructions": figure.found.number().map(rounded),
                    "layers": layers,
                    "devices_in_software": rounded(*devices),
                    "samples": samples,
                })
            }
            Found::Ratio(ratio) => json!({ "name": name, "ratio": rounded(*ratio) }),
            Found::NotMeasured(why) => json!({ "name": name, "not_measured": why }),
        };
        let operation = !matches!(figure.found, Found::Ratio(_) | Found::NotMeasured(_));
        if let Some((requests, kicks)) = figure.asked.filter(|_| operation) {
            result["requests"] = rounded(requests);
            result["kicks"] = rounded(kicks);
        }
        result
    };
    json!({ "qemu": qemu, "arch": arch, "results": figures.iter().map(result).collect::<Vec<_>>() })
}

/// Whole where it is, else with a few digits.
fn rounded(number: f64) -> Json {
    if number.fract() == 0.0 { json!(number as u64) } else { json!((number * 1e4).round() / 1e4) }
}

#[cfg(test)]
pub(super) mod tests {
    use qemu_tests::protocol::CheckResult;
    use qemu_tests::trace::Counts;

    use super::*;

    /// Two rows that were measured, and one of which the guest says why it was not.
    pub(in crate::bench) fn runs() -> Runs {
        let timed = |name: &str, instructions| Timed { name: name.into(), operations: 10, instructions };
        let asked = |name: &str, kicks| {
            let counts = Counts { kicks, pops: 20, ..Counts::default() };
            Asked { name: name.into(), operations: 10, requests: 20, counts, accesses: kicks }
        };
        let not = Check {
            name: "map_unmap_4k_strict_live_1m".into(),
            result: CheckResult::Ok,
            detail: "not measured: too many".into(),
        };
        Runs {
            timed: vec![
                timed("map_unmap_4k_strict", 4_000),
                timed("attach_detach", 6_005),
                timed("blk_4k_qd1_pool", 5_400),
                timed("blk_4k_qd1_strict", 9_000),
            ],
            direct: vec![timed("blk_4k_qd1_pool", 5_000)],
            values: Vec::new(),
            checks: vec![not],
            asked: vec![
                asked("map_unmap_4k_strict", 20),
                asked("attach_detach", 30),
                asked("blk_4k_qd1_pool", 0),
            ],
            draft: draft::tests::runs(),
        }
    }

    fn figure<'f>(figures: &'f [Figure], name: &str) -> &'f Figure {
        figures.iter().find(|figure| figure.target.name == name).unwrap()
    }

    #[test]
    fn figures_are_means_and_are_judged_by_their_targets() {
        let figures = figures(&runs());
        let met = figure(&figures, "map_unmap_4k_strict");
        assert_eq!(met.found, Found::Instructions { mean: 400.0, samples: 10 });
        assert_eq!(met.asked, Some((2.0, 2.0)));
        assert_eq!(met.misses(), Some(vec![]));
        assert_eq!(figure(&figures, "attach_detach").misses(), Some(vec!["figure", "kicks"]));
        assert_eq!(figure(&figures, "mmio_accesses_per_kick").found, Found::Ratio(1.0));
    }

    #[test]
    fn what_is_added_is_the_difference_of_two_machines() {
        let figures = figures(&runs());
        let added = figure(&figures, "blk_added_4k_qd1_pool");
        assert_eq!(added.found, Found::Added { with: 540.0, without: 500.0, samples: 10 });
        assert_eq!(added.asked, Some((2.0, 0.0)));
        assert_eq!(added.misses(), Some(vec!["requests"]));
        let one_machine = figure(&figures, "blk_added_4k_qd1_strict");
        assert!(matches!(one_machine.found, Found::NotMeasured(_)), "{:?}", one_machine.found);
    }

    #[test]
    fn what_was_not_measured_says_why() {
        let figures = figures(&runs());
        let not = |name| figure(&figures, name).found.clone();
        assert_eq!(not("map_unmap_4k_strict_live_1m"), Found::NotMeasured("too many".into()));
        assert_eq!(not("driver_bytes_per_live_mapping"), Found::NotMeasured("too many".into()));
        assert_eq!(not("coherent_4k"), Found::NotMeasured("there is no such row yet".into()));
        assert_eq!(figure(&figures, "coherent_4k").misses(), None);
    }

    #[test]
    fn the_file_has_numbers_only_where_there_are_any() {
        let file = json(&figures(&runs()), "10.0.2", "x86_64");
        let results = file["results"].as_array().unwrap();
        let of = |name: &str| results.iter().find(|result| result["name"] == name).unwrap();
        assert_eq!(
            *of("attach_detach"),
            json!({ "name": "attach_detach", "guest_instructions": 600.5, "requests": 2, "kicks": 3, "samples": 10 })
        );
        assert_eq!(of("coherent_4k")["guest_instructions"], Json::Null);
        let added = of("blk_added_4k_qd1_pool");
        assert_eq!(
            ["guest_instructions", "with_iommu", "without_iommu"].map(|key| added[key].as_u64()),
            [Some(40), Some(540), Some(500)]
        );
        assert_eq!(*of("mmio_accesses_per_kick"), json!({ "name": "mmio_accesses_per_kick", "ratio": 1 }));
        assert_eq!(file["qemu"], "10.0.2");
    }
}
