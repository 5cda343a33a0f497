use crate::{Bench, broken};
use pipe::stage::plot::{KIND, run};
use serde_json::{Value, json};

/// Probes of two training sets over four checkpoints.
fn probes() -> Bench {
    let mut bench = Bench::new();
    for (d, data) in ["s1k", "r1k"].iter().enumerate() {
        let lines: String = [0, 10, 20, 30]
            .iter()
            .map(|step| {
                let chosen = -1.5 + 0.03 * f64::from(*step) + 0.1 * d as f64;
                format!("{}\n", json!({ "step": step, "alp_chosen": chosen, "alp_rejected": chosen - 0.2 }))
            })
            .collect();
        bench.artifact("probe", &[("data", data)], "measurements.jsonl", &lines);
    }
    bench
}

fn curves() -> Value {
    json!({ "x": "step", "y": ["alp_chosen", "alp_rejected"], "series": ["data"], "title": "Figure 2",
            "x_label": "optimizer step", "y_label": "ALP" })
}

#[test]
fn curves_become_a_picture_its_raster_and_its_numbers() {
    let mut bench = probes();
    bench.run(&KIND, run, curves()).expect("a plot");
    let svg = bench.read("plot.svg");
    for text in ["Figure 2", "optimizer step", "ALP", "r1k, alp_rejected", "stroke-dasharray"] {
        assert!(svg.contains(text), "{text}");
    }
    let png = bench.bytes("plot.png");
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    let side = |at: usize| u32::from_be_bytes([png[at], png[at + 1], png[at + 2], png[at + 3]]);
    assert_eq!((side(16), side(20)), (1280, 800));
    let csv = bench.read("plot.csv");
    assert_eq!(csv.lines().count(), 1 + 2 * 2 * 4);
    assert!(csv.starts_with("data,field,step,value\ns1k,alp_chosen,0,-1.5\n"), "{csv}");
}

/// kuva numbers its clips across the process; here they must not show.
#[test]
fn the_second_picture_of_a_process_has_the_bytes_of_the_first() {
    let mut bench = probes();
    bench.run(&KIND, run, curves()).expect("a plot");
    let first = (bench.bytes("plot.svg"), bench.bytes("plot.png"));
    bench.run(&KIND, run, curves()).expect("a plot");
    assert!(first == (bench.bytes("plot.svg"), bench.bytes("plot.png")));
}

/// Without a font no letter would be drawn: the title must darken pixels.
#[test]
fn the_letters_are_drawn_with_the_font_shipped() {
    let mut bench = probes();
    bench.run(&KIND, run, curves()).expect("a plot");
    let with = bench.bytes("plot.png");
    let mut params = curves();
    params["title"] = json!("Figure 3");
    bench.run(&KIND, run, params).expect("a plot");
    assert!(with != bench.bytes("plot.png"));
}

#[test]
fn scores_become_bars_and_a_missing_one_keeps_its_place() {
    let mut bench = Bench::new();
    for (size, data, accuracy) in [("3B", "s1k", 20.0), ("3B", "r1k", 25.0), ("14B", "r1k", 57.0)] {
        bench.scores("eval", &[("size", size), ("data", data)], accuracy);
    }
    let params = json!({ "x": "size", "y": "accuracy", "series": ["data"], "mark": "bar" });
    bench.run(&KIND, run, params).expect("a plot");
    assert_eq!(
        bench.read("plot.csv"),
        "data,field,size,value\ns1k,accuracy,3B,20\nr1k,accuracy,3B,25\nr1k,accuracy,14B,57\n"
    );
    assert!(bench.read("plot.svg").contains("14B"));
}

#[test]
fn a_line_over_names_has_the_names_along_the_bottom() {
    let mut bench = Bench::new();
    for (size, accuracy) in [("3B", 20.0), ("7B", 40.0), ("14B", 57.0)] {
        bench.scores("eval", &[("size", size)], accuracy);
    }
    bench.run(&KIND, run, json!({ "x": "size", "y": "accuracy" })).expect("a plot");
    let svg = bench.read("plot.svg");
    for size in ["3B", "7B", "14B"] {
        assert!(svg.contains(&format!(">{size}<")), "{size}");
    }
}

#[test]
fn the_log_of_a_training_stage_can_be_drawn() {
    let mut bench = Bench::new();
    let log: String = (1..=50).map(|s| format!("{}\n", json!({ "step": s, "loss": 3.0 / f64::from(s) }))).collect();
    bench.artifact("sft", &[("size", "3B")], "log.jsonl", &log);
    bench.run(&KIND, run, json!({ "x": "step", "y": "loss" })).expect("a plot");
    assert_eq!(bench.read("plot.csv").lines().count(), 51);
}

#[test]
fn two_numbers_at_one_place_are_an_error_that_names_the_axis() {
    let mut bench = probes();
    let problem = bench.run(&KIND, run, json!({ "x": "step", "y": "alp_chosen" })).expect_err("a problem");
    assert_eq!(problem.code, "plot::ambiguous");
    assert_eq!(problem.help, ["tell them apart: `series = [\"data\"]`"]);
}

#[test]
fn names_that_nothing_has_are_errors() {
    for params in [
        json!({ "x": "stepp", "y": "alp_chosen", "series": ["data"] }),
        json!({ "x": "step", "y": "alp", "series": ["data"] }),
        json!({ "x": "step", "y": "alp_chosen", "series": ["date"] }),
    ] {
        assert_eq!(probes().run(&KIND, run, params).expect_err("a problem").code, "plot::unknown_name");
    }
    assert_eq!(broken(&KIND, json!({ "x": "step", "y": ["step"] })).len(), 1);
    assert_eq!(broken(&KIND, json!({ "x": "step", "y": [] })).len(), 1);
}
