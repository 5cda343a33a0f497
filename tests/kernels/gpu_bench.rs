//! The code of `benches/gpu`, on small shapes: that each operation runs, and that the table says what was measured.
//! How long the emulator takes means nothing and is printed nowhere.

#[path = "../../benches/gpu/ops.rs"]
mod ops;
#[path = "../../benches/gpu/table.rs"]
mod table;

use crate::support::gpu;
use ops::{Against, Amount, Plan, Sizes, plans};
use pipe::cuda::ops::attention::Dims;
use table::{Limits, Line, Peer, head, median};

const TINY: &str = r#"{ "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu" }"#;

fn small() -> Sizes {
    Sizes {
        matmul: 64,
        copy: 1 << 10,
        attention: (Dims { heads: 2, kv_heads: 1, head_dim: 128 }, vec![70]),
        linears: (20, vec![(40, 24)], vec![16]),
        head: (20, 40, 200),
        rows: (5, 64, 96),
        parameters: 5000,
        step: (TINY, 24, 8),
        short_step: (TINY, 7, 8),
        decode: (TINY, 2, 20, 2),
    }
}

#[test]
fn every_operation_of_the_bench_runs() {
    let plans = plans(&small());
    for plan in &plans {
        let run = (plan.make)(&gpu()).and_then(|mut run| run());
        let seconds = run.unwrap_or_else(|problem| panic!("{}, {}: {problem}", plan.op, plan.shape));
        // Of decoding it is a difference of two times, and one may be off by more than that.
        assert!(seconds > 0.0 || plan.op == "decoding step", "{}: {seconds}", plan.op);
    }
    let ops: std::collections::BTreeSet<&str> = plans.iter().map(|plan| plan.op).collect();
    assert_eq!(ops.len(), 18, "{ops:?}");
}

#[test]
fn what_is_measured_on_a_gpu_has_names_of_its_own() {
    let plans = plans(&Sizes::of_a_gpu());
    let names: std::collections::BTreeSet<(&str, &str)> =
        plans.iter().map(|plan| (plan.op, plan.shape.as_str())).collect();
    assert_eq!(names.len(), plans.len());
    assert!(plans[..2].iter().all(|plan| plan.against == Against::Limit), "limits are known before they are needed");
    let flops = |op: &str| {
        let plan = plans.iter().find(|plan| plan.op == op).expect(op);
        match plan.amount {
            Amount::Flops(flops) | Amount::Bytes(flops) => flops,
        }
    };
    // 4 heads T² D, half of it for the causal mask; 2 rows hidden vocabulary.
    assert_eq!(flops("attention forward"), 4.0 * 28.0 * 4096.0 * 4096.0 * 128.0 / 2.0);
    assert_eq!(flops("attention backward"), 2.5 * flops("attention forward"));
    assert_eq!(flops("head and log-prob forward"), 2.0 * 8192.0 * 3584.0 * 152_064.0);
    // 7.07 billion weights in products: 4 operations for each and every token, and attention.
    assert!((8.4e14..8.5e14).contains(&flops("SFT step")), "{}", flops("SFT step"));
    // 1.54 billion weights of two bytes, and 28,672 bytes for each token that is there.
    assert!((4.9e9..5.1e9).contains(&flops("decoding step")), "{}", flops("decoding step"));
}

fn plan(op: &'static str, amount: Amount, against: Against) -> Plan {
    let make = Box::new(|_: &pipe::cuda::Gpu| unreachable!("nothing is run"));
    Plan { op, shape: "4".to_string(), amount, against, target: 0.8, make }
}

#[test]
fn a_line_holds_ours_against_the_peer_or_the_best_of_the_run() {
    let peer = Peer::read(
        "{\"peer\": \"torch 2\"}\n{\"op\": \"attention\", \"shape\": \"4\", \"seconds\": 0.5}\nsome warning\n\
         {\"op\": \"copy\", \"shape\": \"4\", \"seconds\": 0.25}\n{\"op\": \"RoPE\", \"shape\": \"4\", \"error\": \"none\"}\n",
    );
    assert_eq!((peer.name.as_str(), peer.seconds.len()), ("torch 2", 2));
    let mut limits = Limits::default();
    limits.learn(&plan("product", Amount::Flops(8e14), Against::Limit), 1.0, &peer);
    limits.learn(&plan("copy", Amount::Bytes(1e12), Against::Limit), 0.5, &peer);
    limits.learn(&plan("attention", Amount::Flops(9e20), Against::Peer), 1.0, &peer);
    assert_eq!((limits.matmul, limits.copy), (8e14, 4e12), "of copies the peer's is the faster");

    let line = |plan: Plan, seconds: f64| Line::new(&plan, seconds, 3 << 30, limits, &peer);
    let attention = line(plan("attention", Amount::Flops(1e14), Against::Peer), 0.625);
    assert_eq!((attention.rate, attention.against, attention.ratio), (160.0, Some(200.0), Some(0.8)));
    assert_eq!(attention.met(), Some(true));
    let head_of_model = line(plan("head", Amount::Flops(4e14), Against::Matmul), 1.0);
    assert_eq!((head_of_model.ratio, head_of_model.met()), (Some(0.5), Some(false)));
    let rope = line(plan("RoPE", Amount::Bytes(3e12), Against::Copy), 1.0);
    assert_eq!((rope.unit, rope.rate, rope.ratio), ("GB/s", 3000.0, Some(0.75)));
    let alone = line(plan("linear", Amount::Flops(1e12), Against::Peer), 1.0);
    assert_eq!((alone.ratio, alone.met()), (None, None));
    assert!(alone.text().contains("no peer here") && alone.json()["ratio"].is_null(), "{}", alone.text());
    assert_eq!(alone.text().chars().count(), head().chars().count(), "columns stand below their heads");
    assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
}
