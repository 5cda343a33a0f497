//! One line per convention: gold, answer, verdict. The reasons stand in `src/grade/decide.rs`.

use pipe::grade::Verdict::{self, Correct, Undecided, Wrong};
use pipe::grade::{Kind, check_gold, grade};

fn boxed(gold: &str, answer: &str) -> Verdict {
    grade(gold, &format!("Some steps, and so\n$$\\boxed{{{answer}}}$$"), Kind::Math).verdict
}

fn all(cases: &[(&str, &str, Verdict)]) {
    for (gold, answer, verdict) in cases {
        assert_eq!(boxed(gold, answer), *verdict, "gold {gold}, answer {answer}");
    }
}

#[test]
fn equal_numbers_are_equal_in_any_form() {
    all(&[
        ("\\frac{1}{2}", "0.5", Correct),
        ("\\frac{1}{2}", "\\dfrac12", Correct),
        ("\\frac{1}{2}", "½", Correct),
        ("\\frac{1}{2}", "-\\frac12", Wrong),
        ("4.5", "4\\frac12", Correct),
        ("4.5", "4\\cdot\\frac12", Wrong),
        ("72,000", "72{,}000", Correct),
        ("72,000", "72", Wrong),
        ("023", "23", Correct),
        ("\\frac13", "0.\\overline{3}", Correct),
        ("\\frac13", "0.333", Wrong),
        ("1024", "2^{10}", Correct),
        ("2^{2019}-1", "2\\cdot2^{2018}-1", Correct),
        ("2^{2019}-1", "2^{2019}", Wrong),
        ("9^{9^9}", "9^{387420489}", Correct),
        ("9^{9^9}", "(9^9)^9", Wrong),
        ("12", "\\text{twelve}", Correct),
        ("6.02\\times10^{23}", "6.02e23", Correct),
        ("1", "1+10^{-30}", Wrong),
        ("5", "((((5))))", Correct),
    ]);
}

#[test]
fn magnitudes_and_percent_may_be_words() {
    all(&[
        ("1000000", "1 million", Correct),
        ("2{,}500{,}000", "2.5\\text{ million}", Correct),
        ("1000000", "1 billion", Wrong),
        ("28\\%", "28 percent", Correct),
        ("28\\%", "0.28", Correct),
        ("28\\%", "2800 pct", Wrong),
    ]);
}

#[test]
fn times_of_day_are_no_ratios() {
    all(&[
        ("4:30\\text{ p.m.}", "4:30 PM", Correct),
        ("4:30\\text{ p.m.}", "4:30", Correct),
        ("4:30\\text{ p.m.}", "4:30\\text{ a.m.}", Wrong),
        ("4:30\\text{ p.m.}", "9:60", Wrong),
        ("4:05\\text{ am}", "4:05", Correct),
        ("4:30", "8:60", Correct),
    ]);
}

#[test]
fn residues_are_compared_by_their_modulus() {
    all(&[
        ("n \\equiv 3 \\pmod 7", "3\\pmod{7}", Correct),
        ("n \\equiv 3 \\pmod 7", "10 \\mod 7", Correct),
        ("3 \\pmod{7}", "3\\pmod{5}", Wrong),
        ("3 \\pmod{7}", "4\\pmod{7}", Wrong),
        ("3 \\pmod{7}", "3", Correct),
        ("3", "3\\pmod{7}", Correct),
        ("3", "4\\pmod{7}", Wrong),
        ("3 \\pmod{0}", "3\\pmod{0}", Correct),
    ]);
}

#[test]
fn words_need_no_text_command_and_nothing_has_several_names() {
    all(&[
        ("even", "\\text{Even}", Correct),
        ("even", "\\text{odd}", Wrong),
        ("\\emptyset", "\\text{no solution}", Correct),
        ("\\emptyset", "\\text{no, there are two}", Undecided),
        ("\\frac{NO}{BO}=\\frac{1}{\\sqrt6}", "\\frac{\\sqrt6}{6}", Correct),
        ("|AB|=1", "1", Correct),
        ("|AB|=1", "2", Wrong),
    ]);
}

#[test]
fn latex_that_was_escaped_twice_and_boxed_gold_answers_are_read() {
    all(&[
        ("\\\\frac{1}{2}", "0.5", Correct),
        ("\\frac12", "\\\\frac{1}{2}", Correct),
        ("So $x = \\boxed{17}$.", "17", Correct),
        ("So $x = \\boxed{17}$.", "18", Wrong),
        ("\\begin{pmatrix}1\\\\x\\end{pmatrix}", "\\begin{pmatrix}1\\\\ x\\end{pmatrix}", Correct),
        ("\\begin{pmatrix}1\\\\x\\end{pmatrix}", "\\begin{pmatrix}x\\\\ 1\\end{pmatrix}", Wrong),
    ]);
}

#[test]
fn every_answer_is_the_same_as_itself() {
    for answer in ["\\begin{bmatrix} 1 \\boxedend{bmatrix}}", "x \\boxed{}", "\\boxed{1}\\boxed{2}", "?"] {
        assert!(pipe::grade::same(answer, answer, Kind::Math), "{answer}");
    }
}

#[test]
fn a_response_may_be_nothing_but_its_answer() {
    let verdict = |gold: &str, response: &str| grade(gold, response, Kind::Math).verdict;
    for (gold, response, wanted) in [
        ("10/9", "\\frac{10}{9}", Correct),
        ("0.4", ".4", Correct),
        ("1000", "1 000", Correct),
        ("34", "Final Answer: The largest $n$ is 34.", Correct),
        ("5", "The answer is not 5, it is 6", Undecided),
        ("5", "The answer is 5, which is not 6", Undecided),
        ("4", "Final Answer: The first is 3 and the second is 4", Undecided),
        ("13", "\\boxed{}", Wrong),
        ("4", "Now Eva has 4 balls.", Correct),
        ("4", "Now Eva has 5 balls.", Wrong),
    ] {
        assert_eq!(verdict(gold, response), wanted, "gold {gold}, response {response}");
    }
}

#[test]
fn roots_and_functions_are_compared_by_value() {
    all(&[
        ("\\frac{\\sqrt3}{3}", "\\frac1{\\sqrt3}", Correct),
        ("\\sqrt{7-4\\sqrt3}", "2-\\sqrt3", Correct),
        ("\\sqrt{7-4\\sqrt3}", "2+\\sqrt3", Wrong),
        ("\\sqrt2", "1.41421356237", Wrong),
        ("\\ln 2", "-\\ln\\frac12", Correct),
        ("\\frac{\\pi}{4}", "\\arctan 1", Correct),
        ("|x-2|", "|2-x|", Correct),
        ("|x-2|", "x-2", Wrong),
        ("\\cot x", "\\frac{\\cos x}{\\sin x}", Correct),
        ("\\frac12+\\frac{\\sqrt3}2i", "\\cos60^\\circ+i\\sin60^\\circ", Correct),
        ("\\binom{10}{3}", "{10\\choose 3}", Correct),
        ("\\frac{100!}{50!50!}", "\\binom{100}{50}", Correct),
        ("\\sqrt[3]{-8}", "-2", Correct),
    ]);
}

#[test]
fn units_percents_and_degrees_may_be_left_out_but_not_contradicted() {
    all(&[
        ("15\\text{ cm}^2", "15", Correct),
        ("15\\text{ cm}^2", "15\\text{ m}^2", Wrong),
        ("3\\text{ hours}", "180\\text{ minutes}", Correct),
        ("20\\text{ mph}", "20\\,\\frac{\\text{mi}}{\\text{hr}}", Correct),
        ("\\$18.90", "1890\\text{ cents}", Correct),
        ("10\\%", "0.1", Correct),
        ("10\\%", "10", Correct),
        ("10\\%", "1000", Wrong),
        ("25", "0.25", Wrong),
        ("75^\\circ", "75", Correct),
        ("75^\\circ", "\\frac{5\\pi}{12}", Correct),
        ("75^\\circ", "75\\pi", Wrong),
    ]);
}

#[test]
fn lists_points_and_intervals_keep_what_they_mean() {
    all(&[
        ("1,-2", "x=-2\\text{ or }x=1", Correct),
        ("1,-2", "1", Wrong),
        ("\\{1,2,3\\}", "3,2,1", Correct),
        ("(1,2)", "(2,1)", Wrong),
        ("(15,-29)", "x=15,\\ y=-29", Correct),
        ("(3,4]", "3<x\\le4", Correct),
        ("(3,4]", "[3,4]", Wrong),
        ("(-\\infty,0]", "]-\\infty,0]", Correct),
        ("(-\\infty,2)\\cup(3,\\infty)", "\\mathbb{R}\\setminus[2,3]", Correct),
        ("x\\ne3", "(-\\infty,3)\\cup(3,\\infty)", Correct),
        ("(-\\sqrt3,\\sqrt3)", "|x|<\\sqrt3", Correct),
        ("1\\pm\\sqrt{19}", "1+\\sqrt{19},1-\\sqrt{19}", Correct),
        ("1\\pm\\sqrt{19}", "1+\\sqrt{19}", Wrong),
        ("17", ">17", Wrong),
    ]);
}

#[test]
fn equations_are_the_same_up_to_a_factor() {
    all(&[
        ("y=2x+3", "2x-y+3=0", Correct),
        ("y=2x+3", "y=2x-3", Wrong),
        ("y=2x+3", "2x+3", Correct),
        ("x=5", "5", Correct),
        ("x=5", "y=5", Wrong),
        ("73", "m+n=73", Correct),
        ("x^2+y^2=25", "\\frac{x^2}{25}+\\frac{y^2}{25}=1", Correct),
    ]);
}

#[test]
fn matrices_bases_ratios_and_words() {
    all(&[
        ("\\begin{pmatrix}-1\\\\2\\end{pmatrix}", "-\\begin{bmatrix}1\\\\-2\\end{bmatrix}", Correct),
        ("\\begin{pmatrix}-1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", Wrong),
        ("2516_8", "2516", Correct),
        ("204_5", "54", Wrong),
        ("3:5", "6:10", Correct),
        ("1:2:3", "1:3:2", Wrong),
        ("\\text{Evelyn}", "Evelyn.", Correct),
        ("\\text{even}", "\\text{odd}", Wrong),
        ("\\text{(C)}", "C", Correct),
        ("\\text{east}", "\\text{west}", Wrong),
    ]);
}

#[test]
fn what_no_rule_settles_is_undecided() {
    all(&[
        ("17", "17\\ldots", Undecided),
        ("5", "\\gcd(10^{300}+1,10^{299}+7)", Undecided),
        ("5\\text{ apples}", "5\\text{ oranges}", Undecided),
    ]);
}

#[test]
fn the_answer_is_found_where_it_was_given() {
    let cases: &[(&str, &str, Option<&str>, &str)] = &[
        ("7", "\\boxed{5} no, \\boxed{7}", Some("7"), "box"),
        ("2,3", "$\\boxed{2}$ and $\\boxed{3}$", Some("2, 3"), "boxes"),
        ("3/56", "$\\boxed{\\frac{3}{5{6}}}$", Some("\\frac{3}{5{6}}"), "box"),
        ("18", "So the final answer is 18.", Some("18"), "mark"),
        ("18", "work\n#### 18", Some("18"), "mark"),
        ("18", "So there are **18**.", Some("18"), "bold"),
        ("18", "We have \\(18\\).", Some("18"), "formula"),
        ("18", "In total 18 ways", Some("18"), "last line"),
        (
            "42",
            "<|im_start|>think\n\\boxed{41}\n<|im_start|>answer\n\\boxed{42}<|im_end|>\\boxed{1}",
            Some("42"),
            "box",
        ),
        ("42", "<think>\\boxed{41}</think>So \\boxed{42}", Some("42"), "box"),
        ("42", "<|im_start|>think\nSo \\boxed{42}", None, "none"),
        ("42", "<think>It must be \\boxed{42}", None, "none"),
        ("42", "put it in \\boxed{}", None, "none"),
        ("42", "", None, "none"),
    ];
    for (gold, response, extracted, found) in cases {
        let graded = grade(gold, response, Kind::Math);
        assert_eq!((graded.extracted.as_deref(), graded.found), (*extracted, *found), "{response}");
        assert_eq!(graded.verdict, if extracted.is_some() { Correct } else { Wrong }, "{response}");
    }
}

#[test]
fn a_choice_is_one_letter_and_no_answer_never_scores() {
    for response in
        ["Answer: B", "The answer is **(B)**", "\\boxed{\\text{(B)}}", "answer is option b", "B) because it is", "(B)"]
    {
        assert_eq!(grade("B", response, Kind::Choice).verdict, Correct, "{response}");
    }
    for response in
        ["Answer: A, B", "Answer: C", "", "I cannot tell.", "Answer: β", "The answer is a number", "\\boxed{A or B}"]
    {
        assert_eq!(grade("B", response, Kind::Choice).verdict, Wrong, "{response}");
        assert_eq!(grade("A", response, Kind::Choice).verdict, Wrong, "{response}");
    }
}

#[test]
fn a_gold_answer_that_means_nothing_is_found_before_it_is_used() {
    assert!(check_gold("42", Kind::Number).is_ok());
    assert!(check_gold("\\text{even}", Kind::Math).is_ok());
    assert!(check_gold("\\text{even}", Kind::Number).is_err());
    assert!(check_gold("", Kind::Math).is_err());
    assert!(check_gold("\\frac{1}{", Kind::Math).is_err());
    assert!(check_gold("c", Kind::Choice).is_ok());
    assert!(check_gold("AB", Kind::Choice).is_err());
}
