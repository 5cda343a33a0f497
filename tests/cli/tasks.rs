//! Tasks from the outside: shipped ones with a bundled model, a user's own file, and what is wrong with one.

use crate::Project;

const STUDY: &str = r#"manifest = 1
include = ["task:mini"]

[stage.base]
kind = "model"
source = "init:mini-3B"

[stage.eval]
kind = "eval"
axes = { task = ["mini-math500", "mini-gpqa-diamond"] }
model = "base"
task = "{task}"
limit = 2
"#;

const GPQA: &str =
    "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Canary String
rec1,\"How many, of 2 and 2?\",4,3,5,22,-
rec2,\"Which is
larger?\",7,6,\"5, or 4\",1,-
";

fn gpqa(text: &str) -> Project {
    let manifest = STUDY.replace("task:mini", "task:gpqa-diamond").replace("\"mini-math500\", \"mini-", "\"");
    let project = Project::with(&manifest.replace("limit = 2", "max_tokens = 8"));
    project.write("gpqa-diamond.csv", text);
    project
}

#[test]
fn a_study_of_bundled_models_and_tasks_needs_nothing_and_tells_what_of_a_task_has_changed() {
    let project = Project::with(STUDY);
    let run = project.transcript(&["run", "m.toml"]);
    assert!(run.contains("exit 0"), "{run}");
    let asked = ["--set", "task.mini-math500.prompt=Solve. {{ question }}"];
    let why = project.stdout(&[&["why", "m.toml", "eval[task=mini-math500]"], asked.as_slice()].concat());
    assert!(why.contains("is stale") && why.contains("prompt: ") && why.contains("\"Solve. {{ question }}\""), "{why}");
    let other = project.stdout(&[&["why", "m.toml", "eval[task=mini-gpqa-diamond]"], asked.as_slice()].concat());
    assert!(other.contains("is fresh"), "{other}");
}

#[test]
fn gpqa_is_the_users_own_file_beside_the_manifest() {
    let project = gpqa(GPQA);
    let run = project.transcript(&["run", "m.toml"]);
    assert!(run.contains("exit 0"), "{run}");
    assert_eq!(project.code(&["export", "m.toml", "eval[task=gpqa-diamond]", "out"]), Some(0));
    let transcripts = std::fs::read_to_string(project.path("out/transcripts.jsonl")).expect("exported");
    let lines: Vec<serde_json::Value> = transcripts.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[1]["id"]), (2, &"rec2".into()));
    for (line, right) in lines.iter().zip(["4", "7"]) {
        let at = line["order"].as_array().unwrap().iter().position(|choice| choice == 0).unwrap();
        let letter = ["A", "B", "C", "D"][at];
        assert_eq!(line["gold"], letter);
        assert!(line["prompt"].as_str().unwrap().contains(&format!("{letter}) {right}")), "{line}");
    }
    std::fs::remove_file(project.path("gpqa-diamond.csv")).expect("removed");
    let lacks = project.transcript(&["run", "m.toml"]);
    assert!(lacks.contains("exit 3") && lacks.contains("gpqa-diamond.csv"), "{lacks}");
}

#[test]
fn every_bad_row_of_a_task_is_named_before_the_model_answers() {
    let column = gpqa(&GPQA.replace("Incorrect Answer 2", "Wrong Answer 2"));
    let told = column.transcript(&["run", "m.toml"]);
    assert!(told.contains("exit 1") && told.contains("line 1 (id `rec1`): no `Incorrect Answer 2`"), "{told}");
    assert!(told.contains("line 2 (id `rec2`)") && told.contains("`choices`"), "{told}");
    let ragged = gpqa(&GPQA.replace("4,3,5,22,-", "4,3,5,22").replace("\"5, or 4\"", "5, or 4"));
    let told = ragged.transcript(&["run", "m.toml"]);
    assert!(told.contains("exit 1") && told.contains("line 2: ") && told.contains("line 3: "), "{told}");
    let twice = gpqa(&GPQA.replace("rec2", "rec1"));
    let told = twice.transcript(&["run", "m.toml"]);
    assert!(told.contains("exit 1") && told.contains("id `rec1` is taken by line 2"), "{told}");

    let own = "\n[stage.sums]\nkind = \"dataset\"\nsource = \"path:sums.jsonl\"\n\
               [task.own]\ndata = \"sums\"\ngrader = \"numeric\"\nmax_tokens = 4\n";
    let text = STUDY.replace("\"mini-math500\", \"mini-gpqa-diamond\"", "\"own\"");
    let project = Project::with(&format!("{text}{own}"));
    project.write(
        "sums.jsonl",
        "{\"question\": \"a\", \"answer\": \"\\\\frac{1}{\"}\n{\"question\": \"b\", \"answer\": \"\\\\sqrt{\"}\n",
    );
    let told = project.transcript(&["run", "m.toml"]);
    assert!(told.contains("exit 1") && told.contains("line 1 ") && told.contains("line 2 "), "{told}");
    assert!(told.contains("the answer `\\sqrt{` cannot be graded"), "{told}");
}

#[test]
fn a_task_file_that_is_no_text_or_does_not_parse_is_named_with_its_include() {
    let project = Project::with(&STUDY.replace("[\"task:mini\"]", "[\"task:mini\", \"latin.toml\", \"torn.toml\"]"));
    std::fs::write(project.path("latin.toml"), b"manifest = 1\n# \xe9\n").expect("written");
    project.write("torn.toml", "manifest = 1\n[task.x\n");
    let told = project.transcript(&["validate", "m.toml"]);
    assert!(told.contains("exit 2") && told.contains("latin.toml") && told.contains("UTF-8"), "{told}");
    assert!(told.contains("torn.toml") && told.contains("[task.x"), "{told}");
    // Problems in a file that is part of the program are shown in it.
    let wrong = project.transcript(&["validate", "m.toml", "--set", "task.mini-aime24.grader=aut"]);
    assert!(wrong.contains("`auto`"), "{wrong}");
}
