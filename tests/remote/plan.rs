//! What a plan tells of calls and their cost before anything is asked, and what a run says when it begins.

use crate::server::{Server, question};
use crate::study::Study;
use serde_json::{Value, json};

fn set(study: &Study, from: &str, to: &str) {
    let text = std::fs::read_to_string(study.path("m.toml")).unwrap();
    assert!(text.contains(from), "{from}");
    std::fs::write(study.path("m.toml"), text.replacen(from, to, 1)).unwrap();
}

impl Study {
    fn planned(&self, more: &[&str]) -> Value {
        let output = self.command(&[&["plan", "m.toml", "--json"], more].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn work(&self, cell: &str) -> Value {
        let plan = self.planned(&[]);
        plan["cells"].as_array().unwrap().iter().find(|found| found["cell"] == cell).unwrap()["work"].clone()
    }

    fn told(&self) -> String {
        String::from_utf8(self.command(&["plan", "m.toml"]).output().unwrap().stdout).unwrap()
    }
}

#[test]
fn a_plan_asks_nobody_and_counts_what_the_journal_lacks() {
    let server = Server::start();
    let study = Study::new(&server, 5);
    assert_eq!(study.work("answers"), json!({"unknown_until": "questions"}));
    assert!(study.told().contains("answers  unknown until `questions` is made"), "{}", study.told());
    study.ok(&["questions"]);
    let work = study.work("answers");
    // `question N.` behind `Solve: `, and `Be brief.`, 32 a message and 64 on top; 50 tokens each.
    let prompt = (7 + 11) + 9 + 2 * 32 + 64;
    assert_eq!(
        work["at_most"],
        json!({
            "calls": 5, "prompt_tokens": 5 * prompt, "completion_tokens": 250, "cost": (5 * prompt + 500) as f64 / 1e6,
        })
    );
    assert_eq!(
        (&work["if_none_parses"]["calls"], &work["kept"], &work["likely"]),
        (&json!(15), &json!(0), &Value::Null)
    );
    assert_eq!(server.seen().len(), 0);
    // After a kill: two replies are kept.
    server.hold_after(2);
    let mut run = study.command(&["run", "m.toml"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    while study.journalled() < 2 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    server.hold_after(usize::MAX);
    server.seen();
    let work = study.work("answers");
    assert_eq!((&work["at_most"]["calls"], &work["kept"], &work["completions"]), (&json!(3), &json!(2), &json!(5)));
    let (likely, most) = (&work["likely"], &work["at_most"]);
    assert_eq!((&likely["by_replies"], &likely["of_this_stage"]), (&json!(2), &json!(true)));
    assert!(likely["cost"].as_f64() < most["cost"].as_f64() && likely["cost"].as_f64() > Some(0.0), "{work}");
    let told = study.told();
    assert!(told.contains("3 calls of `teacher-large` (2 of 5 replies are there)"), "{told}");
    assert!(told.contains("going by 2 replies of its own"), "{told}");
    assert!(told.contains("total: 3 calls, cost at most "), "{told}");
    assert_eq!(server.seen().len(), 0, "a plan asks nobody");
    let said = study.ok(&[]);
    assert!(said.contains("`teacher-large` at `127.0.0.1:"), "{said}");
    assert!(said.contains(": 3 calls (at most 9, if no reply parses), cost at most "), "{said}");
    assert_eq!(server.asked().len(), 3);
    assert!(!study.told().contains("work:"));
}

#[test]
fn replies_that_do_not_parse_are_counted_as_they_will_be_asked_for() {
    let server = Server::start();
    let study = Study::new(&server, 4);
    server.model(|body| {
        let none = question(body).contains("question 1.");
        (json!(if none { "no box" } else { "\\boxed{7}" }), "stop")
    });
    study.fails(1, &["--set", "stage.answers.max_parse_attempts=1"]);
    assert_eq!(server.asked().len(), 4);
    let work = study.work("answers");
    assert_eq!((&work["at_most"]["calls"], &work["if_none_parses"]["calls"]), (&json!(1), &json!(2)));
    study.fails(1, &[]);
    assert_eq!(server.asked().len(), 2);
    // All tries are used up: nothing is left to ask, and the stage will fail as before.
    assert_eq!(study.work("answers")["at_most"]["calls"], 0);
}

#[test]
fn a_stage_over_answers_that_are_not_there_counts_its_completions_alone() {
    let server = Server::start();
    let study = Study::new(&server, 5);
    let more = "\n[stage.checked]\nkind = \"generate\"\nendpoint = \"teacher\"\ndata = \"answers\"\n\
                prompt = \"Is {{ answer }} right?\"\nmax_tokens = 10\nn = 2\ntemperature = 1.0\n";
    set(&study, "parse = { kind = \"boxed\" }\n", &format!("parse = {{ kind = \"boxed\" }}\n{more}"));
    study.ok(&["questions"]);
    let plan = study.planned(&[]);
    let work = study.work("checked");
    assert_eq!((&work["at_most"]["calls"], &work["at_most"]["completion_tokens"]), (&json!(10), &json!(100)));
    assert_eq!((&work["prompts_known"], &work["unknown_until"]), (&json!(false), &json!("answers")));
    assert_eq!(plan["endpoints"][0]["at_most"]["calls"], 15);
    assert_eq!(
        (&plan["endpoints"][0]["not_counted"], &plan["total"]["unknown_cells"]),
        (&json!(["checked"]), &json!(1))
    );
    assert!(study.told().contains("prompts unknown until `answers` is made"), "{}", study.told());
}

#[test]
fn a_budget_that_may_not_last_is_warned_of_and_two_stages_that_ask_the_same_count_once() {
    let server = Server::start();
    let study = Study::new(&server, 5);
    set(&study, "price_out = 2.0", "price_out = 2.0\nbudget = 0.001");
    set(
        &study,
        "[stage.answers]",
        "[stage.again]\nkind = \"generate\"\nendpoint = \"teacher\"\ndata = \"questions\"\nsystem = \"Be brief.\"\nprompt = \"Solve: {{ question }}\"\nmax_tokens = 50\n\n[stage.answers]",
    );
    study.ok(&["questions"]);
    let plan = study.planned(&[]);
    let endpoint = &plan["endpoints"][0];
    assert_eq!((&endpoint["at_most"]["calls"], &endpoint["may_pass_budget"]), (&json!(5), &json!(true)));
    assert!(study.told().contains("warning: this may be more than is left of the budget"), "{}", study.told());
    set(&study, "budget = 0.001", "budget = 1.0");
    let told = study.told();
    assert!(told.contains("0.00 of the budget of 1.00 is paid") && !told.contains("warning"), "{told}");
    let none = study.command(&["plan", "m.toml", "--no-counts"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&none.stdout).contains("work:"));
}
