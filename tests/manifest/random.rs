//! Nothing that is written makes it panic, and what it makes is in order.

use super::*;
use proptest::prelude::*;

/// Lines that fit together now and then.
const LINES: &[&str] = &[
    "[stage.a]",
    "[stage.b]",
    "[stage.c]",
    "[profile.p]",
    "[profile.p.stage.a]",
    "[stage.a.axes]",
    "[[stage.a.skip]]",
    "kind = \"sft\"",
    "kind = \"dataset\"",
    "kind = \"model\"",
    "kind = \"eval\"",
    "kind = \"table\"",
    "kind = 1",
    "model = \"a\"",
    "model = \"b[x=1]\"",
    "model = \"{x}\"",
    "data = \"c\"",
    "data = \"{x}\"",
    "from = [\"a\", \"b\"]",
    "concat = [\"a\", \"{x}\"]",
    "source = \"path:{x}\"",
    "source = \"hf:y\"",
    "source = [\"path:a\"]",
    "task = \"{x}\"",
    "axes = { x = [1, 2], y = [\"a\", \"b\", \"c\"] }",
    "axes = { x = [\"a\", \"gpqa\"] }",
    "axes = { x = [] }",
    "skip = [{ x = 1 }]",
    "skip = [{ y = \"a\", x = 2 }]",
    "lora = { rank = \"{x}\" }",
    "lora.rank = 1",
    "epochs = \"{x}\"",
    "stage.a.kind = \"dataset\"",
    "stage.b = { epochs = 2 }",
    "stage.a.axes.x = [3]",
    "title = \"{x}\"",
    "x = nan",
    "sample = { pairs = 2, seed = -1 }",
    "description = \"{y}\"",
    "include = [\"m.toml\", \"n.toml\"]",
    "rank = 2",
    "é = \"é{é}\"",
];

fn run(files: Files<'_>, profiles: &[&str], sets: &[&str]) -> Result<Plan, ()> {
    let manifest = load(files, profiles, sets);
    match plan::resolve(&manifest) {
        Ok(plan) => {
            assert!(manifest.problems.is_empty());
            Ok(plan)
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            // Every place can be shown.
            render(&manifest, &problems);
            Err(())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn manifests_of_random_lines_never_panic(picks in prop::collection::vec(0..LINES.len(), 0..24), chosen in any::<bool>()) {
        let mut text = String::from("manifest = 1\n");
        for pick in picks {
            text += LINES[pick];
            text.push('\n');
        }
        let profiles: &[&str] = if chosen { &["p"] } else { &[] };
        if let Ok(plan) = run(&[("m.toml", &text), ("n.toml", "manifest = 1\n[stage.c]\nkind = \"dataset\"\nsource = \"path:c\"\n")], profiles, &[]) {
            for (id, cell) in plan.cells.iter().enumerate() {
                prop_assert!(cell.inputs.iter().flat_map(|input| &input.cells).all(|&need| need < id));
            }
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}", set in "\\PC{0,40}") {
        let _ = run(&[("m.toml", &text)], &[], &[&set]);
        let _ = run(&[("m.toml", "manifest = 1\n")], &[], &[&format!("stage.{set}")]);
    }

    #[test]
    fn mutilated_manifests_never_panic(at in 0usize..1500, drop in 0usize..40, put in "[\\[\\]{}=\"\\.,\\n a-z0-9é]{0,6}") {
        let mut text = format!("manifest = 1\n{}", planning::PAPER);
        let at = at.min(text.len());
        let end = (at + drop).min(text.len());
        text.replace_range(at..end, &put);
        let _ = run(&[("m.toml", &text)], &["mini"], &["stage.sft.epochs=2"]);
    }

    /// Random graphs of datasets: the plan is in order exactly when there is no cycle.
    #[test]
    fn random_graphs_come_in_order_or_with_a_true_cycle(
        needs in (1usize..9).prop_flat_map(|n| prop::collection::vec(prop::collection::vec(0..n, 0..3), n))
    ) {
        let mut text = String::from("manifest = 1\n");
        for (stage, needs) in needs.iter().enumerate() {
            text += &format!("[stage.s{stage}]\nkind = \"dataset\"\n");
            match needs.is_empty() {
                true => text += "source = \"path:x\"\n",
                false => text += &format!("concat = [{}]\n", needs.iter().map(|n| format!("\"s{n}\"")).collect::<Vec<_>>().join(", ")),
            }
        }
        let manifest = load(&[("m.toml", &text)], &[], &[]);
        match plan::resolve(&manifest) {
            Ok(plan) => {
                prop_assert_eq!(plan.cells.len(), needs.len());
                for (id, cell) in plan.cells.iter().enumerate() {
                    prop_assert!(cell.inputs.iter().flat_map(|input| &input.cells).all(|&need| need < id));
                }
            }
            Err(problems) => {
                for problem in &problems {
                    prop_assert_eq!(problem.code, "plan::cycle");
                    // `three stages wait ...: s1 -> s2 -> s1`: each arrow is a need that is written.
                    let (_, path) = problem.message.split_once(": ").unwrap_or(("", &problem.places[0].label));
                    let stages: Vec<usize> = path
                        .split(if path.contains("->") { " -> " } else { " needs " })
                        .map(|name| name[1..].parse().unwrap())
                        .collect();
                    for pair in stages.windows(2) {
                        prop_assert!(needs[pair[0]].contains(&pair[1]));
                    }
                }
            }
        }
    }
}
