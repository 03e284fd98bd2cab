//! The figures of the draft's contexts and of nesting, which a kernel of their own measures.

use qemu_tests::bench::{self, Asked, Timed};
use qemu_tests::protocol::{Check, Value};

use super::figures::{Figure, Found, reason};
use super::targets::{DRAFT, Target};

/// What the runs of that kernel gave.
pub(super) struct Draft {
    pub(super) timed: Vec<Timed>,
    /// All that the timed guest stated.
    pub(super) values: Vec<Value>,
    pub(super) checks: Vec<Check>,
    pub(super) asked: Vec<Asked>,
}

/// The driver alone, on QEMU's device, and with one device in software between.
const DEPTHS: [&str; 2] = ["nested_map_unmap_depth1", "nested_map_unmap_depth2"];

/// Every figure, in the order of the table.
pub(super) fn figures(runs: &Draft) -> Vec<Figure> {
    DRAFT.iter().map(|target| figure(runs, target)).collect()
}

fn figure(runs: &Draft, target: &'static Target) -> Figure {
    let row = runs.timed.iter().find(|timed| timed.name == target.name);
    let found = row.map_or_else(
        || Found::NotMeasured(reason(&runs.checks, target.name)),
        |row| {
            let means = means(runs, row);
            let devices = means.iter().skip(1).step_by(2).sum();
            Found::Layers { own: own(runs, &means), devices, samples: row.operations }
        },
    );
    let asked = runs.asked.iter().find(|asked| asked.name == target.name);
    let each = |asked: &Asked, count: u64| count as f64 / asked.operations as f64;
    let asked = asked.map(|asked| (each(asked, asked.requests), each(asked, asked.counts.kicks)));
    Figure { target, found, asked }
}

/// The instructions of each layer for one operation: the driver, a device, what that calls, and so on.
fn means(runs: &Draft, row: &Timed) -> Vec<f64> {
    let layers = bench::layers(&runs.values, row);
    layers.into_iter().map(|layer| layer as f64 / row.operations as f64).collect()
}

/// The layers that are not devices, by name. What a device calls is a nest and the driver below it: that driver takes what
/// it takes where it is the first layer, of the row for its depth, and the nest takes the rest.
fn own(runs: &Draft, means: &[f64]) -> Vec<(String, f64)> {
    let depth = means.len() / 2 + 1;
    let mut own: Vec<_> = means.first().map(|mean| ("driver".to_owned(), *mean)).into_iter().collect();
    for (above, mean) in means.iter().copied().step_by(2).skip(1).enumerate() {
        // The outermost is on QEMU's device, all others are on one in software.
        let alone = DEPTHS[usize::from(above + 2 < depth)];
        let alone = runs.timed.iter().find(|timed| timed.name == alone);
        match alone.and_then(|row| means_of_first(runs, row)) {
            Some(driver) => own.extend([("nest".to_owned(), mean - driver), ("driver".to_owned(), driver)]),
            None => own.push(("nest and driver".to_owned(), mean)),
        }
    }
    own
}

fn means_of_first(runs: &Draft, row: &Timed) -> Option<f64> {
    means(runs, row).first().copied()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Ten operations of each row of nesting.
    pub(in crate::bench) fn runs() -> Draft {
        let timed = |name: &str, instructions| Timed { name: name.into(), operations: 10, instructions };
        let value = |name: &str, number| Value { name: name.into(), number, unit: "instructions".into() };
        Draft {
            timed: vec![
                timed("nested_map_unmap_depth1", 4_000),
                timed("nested_map_unmap_depth2", 20_000),
                timed("nested_map_unmap_depth3", 40_000),
            ],
            values: vec![
                value("nested_map_unmap_depth2.within.1", 17_000),
                value("nested_map_unmap_depth2.within.2", 9_000),
                value("nested_map_unmap_depth3.within.1", 37_000),
                value("nested_map_unmap_depth3.within.2", 30_000),
                value("nested_map_unmap_depth3.within.3", 22_000),
                value("nested_map_unmap_depth3.within.4", 10_000),
            ],
            checks: Vec::new(),
            asked: Vec::new(),
        }
    }

    fn layers(name: &str) -> (Vec<(String, f64)>, f64) {
        let figures = figures(&runs());
        let figure = figures.iter().find(|figure| figure.target.name == name).unwrap();
        match &figure.found {
            Found::Layers { own, devices, .. } => (own.clone(), *devices),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn devices_in_software_count_for_nobody_and_a_nest_is_what_its_driver_leaves() {
        let (own, devices) = layers("nested_map_unmap_depth1");
        assert_eq!((own, devices), (vec![("driver".into(), 400.0)], 0.0));
        let (own, devices) = layers("nested_map_unmap_depth2");
        let expected = [("driver", 300.0), ("nest", 500.0), ("driver", 400.0)];
        assert_eq!((own, devices), (expected.map(|(name, mean)| (name.to_owned(), mean)).to_vec(), 800.0));
        // The driver in the middle is one on a device in software.
        let (own, devices) = layers("nested_map_unmap_depth3");
        let expected =
            [("driver", 300.0), ("nest", 500.0), ("driver", 300.0), ("nest", 600.0), ("driver", 400.0)];
        assert_eq!((own, devices), (expected.map(|(name, mean)| (name.to_owned(), mean)).to_vec(), 1_900.0));
    }
}
