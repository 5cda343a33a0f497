use super::*;
use minijinja::context;

fn render(text: &str) -> Result<String, Error> {
    let mut templates = Templates::new(Environment::new(), |_| None);
    templates.add("t", text)?;
    templates.render("t", context! { x => vec![1, 2], s => "a", m => context! { k => "v" } })
}

fn plain_render(text: &str) -> Result<String, Error> {
    let mut env = Environment::new();
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_template("t", text)?;
    env.get_template("t")?.render(context! { x => vec![1, 2], s => "a", m => context! { k => "v" } })
}

#[test]
fn marks_change_nothing_that_a_template_says() {
    for text in [
        "{{ 'a' ~ x ~ -1 ~ s|upper ~ (1 if s else 2) }}",
        "{{ s ~ 1 * 2 + 3 if false else -1 ~ s }}",
        "{{ 1e-5 ~ 1.5 ~ 0x1f ~ x.0 ~ x[0] ~ m.k ~ m['k'] ~ '~' ~ \"\\\"~\" }}",
        "{{ 'a' in 'b' ~ 'a' }} {{ 'a' ~ 'c' not in s }} {{ s in ['a', 'b'] }} {{ not s ~ 'b' in 'ab' }}",
        "{{ s is defined ~ 'x' }} {{ s is not none and s ~ 'x' is string }} {{ 1 is in [1, 2] }} {{ 1 is not in [1] }}",
        "{% for i in x + [3] if i ~ '' != '2' %}{{ loop.index ~ i }}{% else %}none{% endfor %}",
        "{% for a, b in m.items() %}{{ a ~ b }}{% endfor %}{% for (a, b) in m|items %}{{ a }}{% endfor %}",
        "{% set ns = namespace(a=1, b=[]) %}{% for i in x %}{% set ns.a = ns.a ~ i %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.a }}{{ ns.b }}",
        "{% set ns = namespace() %}{% set ns.a, ns.b = 1, s ~ s %}{{ ns.b ~ ns.a }}{% set ns.c | upper %}abc{% endset %}{{ ns.c }}",
        "{% set ns = namespace() %}{% set ns.t = 1, 2 %}{{ ns.t }}{% set ns.m = {'a': 1} %}{{ ns.m }}{{ ns.m.a }}{% set ns.i = x|map('string') %}{{ ns.i|join('-') }}",
        "{% macro f(a, b='x' ~ 'y') %}{{ a ~ b }}{% endmacro %}{{ f(1) ~ f(*x) ~ f(**{'a': 2}) }}",
        "{% raw %}{{ a ~ {% endraw %}{# {{ ~ #}{%- raw -%} {% set ns.a %} {%- endraw -%} {% if s %}{{- s -}}{% endif %}",
        "{{ {'a': {'b': s ~ 1}}.a.b }}{{ [s ~ s, (s ~ 1)][1:][0] }}{{ x|join(', ' ~ s) }}{{ m.get('z', 'q' ~ 1) }}",
        "{% set a %}x{% endset %}{% set b = a ~ a %}{% filter upper|replace('X', 'y') %}{{ b }}{% endfilter %}{{ x|map('string')|join }}",
        "{{ s.replace('a', 'bb').split('b')|length }} {{ '{:>5}'.format(s) }} {{ ', '.join(['1', '2']) }}",
        "{% with q = s ~ 1, r = 2 %}{{ q ~ r }}{% endwith %}{% call(v) g() %}{% endcall %}",
        "{{ s.upper() ~ s.not ~ s }}",
        "{{ 2 ** 3 ~ 1 }}{{ 'ab' * 2 ~ 'c' }}{{ s ~ s == 'aa' }}{{ (s ~ s)|length > 1 }}",
        "{{ x ~ }}",
        "{{ ( }}",
        "{{ 'a",
        "{% set",
    ] {
        match (plain_render(text), render(text)) {
            (Ok(plain), Ok(bounded)) => assert_eq!(plain, bounded, "{text}"),
            (Err(plain), Err(bounded)) => {
                assert_eq!((plain.kind(), plain.line()), (bounded.kind(), bounded.line()), "{text}")
            }
            (plain, bounded) => panic!("{text}: {plain:?} became {bounded:?}\n{}", scan::scan(text).text),
        }
    }
}

/// Each, as long as it may be, gives a text or an error, and the process lives.
#[test]
fn a_template_that_nests_without_end_is_refused() {
    let repeated: [(&str, &str, &str); 22] = [
        ("{{ ", "-", "1 }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ s", ".b", " }}"),
        ("{{ s", "|upper", " }}"),
        ("{{ 'a'", "~'a'", " }}"),
        ("{{ s", "~s", " }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ s", "()", " }}"),
        ("{{ s", "[0]", " }}"),
        ("{{ ", "1 if 1 else ", "1 }}"),
        ("{% if 0 %}", "{% elif 0 %}", "{% endif %}"),
        ("{{ s", " is defined", " }}"),
        ("{{ 1", " and 1", " }}"),
        ("{{ ", "(", "1 }}"),
        ("{{ ", "[", "1 }}"),
        ("{{ ", "{1:", "1 }}"),
        ("", "{% if 1 %}", ""),
        ("", "{% for a in x %}", ""),
        ("{% set a = x %}", "{% set a = [a] %}", "{{ a }}"),
        ("{{ x", "*1", " }}"),
        ("{{ 1", " if 1", " }}"),
        ("{{ s.x", ".replace('a')", " }}"),
    ];
    for (start, middle, end) in repeated {
        for count in [100, 1_000, 3_000, 19_990, 100_000] {
            let text = format!("{start}{}{end}", middle.repeat(count));
            let symbols = scan::scan(&text).symbols;
            if let Err(error) = render(&text) {
                assert!(symbols <= SYMBOLS || help_for(&error).is_some(), "{middle} {count}: {error}");
            } else {
                assert!(symbols <= SYMBOLS, "{middle} {count}");
            }
        }
    }
}

#[test]
fn a_template_that_grows_without_end_is_refused_as_a_limit() {
    for text in [
        "{% set ns=namespace() %}{% set ns.a=ns %}{{ ns }}",
        "{% set ns=namespace() %}{% set ns.a | default(ns, true) %}{% endset %}{{ ns }}",
        "{% set a=namespace() %}{% set b=namespace() %}{% set a.x=[b] %}{% set b.x={'k': a} %}{{ a }}",
        "{% set ns=namespace(a=[1]) %}{% for i in range(100000) %}{% set ns.a=[ns.a] %}{% endfor %}",
        "{% set ns=namespace(a=[1]) %}{% for i in range(100000) %}{% set ns.a={'k': ns.a} %}{% endfor %}",
        "{% set ns=namespace(a='a') %}{% for i in range(60) %}{% set ns.a=ns.a ~ ns.a %}{% endfor %}",
        "{% set ns=namespace(a=['aaaaaaaa']) %}{% for i in range(60) %}{% set ns.a=[ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
        "{% set ns=namespace(a=['aaaaaaaa']) %}{% for i in range(60) %}{% set ns.a=ns.a + ns.a %}{% endfor %}{{ ns.a }}",
        "{% for x in [1] %}{% set ns=namespace() %}{% set ns.a=loop %}{% endfor %}",
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% else %}{{ '' ~ x }}{% endif %}{% endmacro %}{{ m('aaaa', 40) }}",
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ m('aaaa', 40) }}",
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% else %}{{ x|string }}{% endif %}{% endmacro %}{{ m('aaaa', 40) }}",
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% else %}{{ ', '.join(x) }}{% endif %}{% endmacro %}{{ m('aaaa', 40) }}",
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% else %}{{ x in 'abc' }}{% endif %}{% endmacro %}{{ m('aaaa', 40) }}",
        "{{ '' ~ [[1] * 100000] * 100000 }}",
        "{{ [1] * 100000000 }}",
        "{{ ('a'*100000).replace('a','b'*100000) }}",
        "{{ ('a'*100000)|replace('a','b'*100000) }}",
        "{{ ('a'*100000).join(range(100000)) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ ('a,'*49000000).split(',')|length }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(10000) %}{{ 'a' * 1000000 }}{% endfor %}",
    ] {
        let error = render(text).map(|text| text.len()).expect_err(text);
        assert!(help_for(&error).is_some(), "{text}: {error:?}");
    }
}

#[test]
fn a_template_that_calls_itself_is_refused() {
    for text in [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m([[[x]]]) }}{% endmacro %}{{ m(1) }}",
        "{% include 't' %}",
        "{% extends 't' %}",
        "{% import 't' as t %}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{{ 'a' * 1000000000 }}",
        "{{ range(1000000000) }}",
    ] {
        render(text).map(|text| text.len()).expect_err(text);
    }
}

/// The deepest values that macros and loops can hand on are dropped, compared and printed on the stack there is.
#[test]
fn a_value_as_deep_as_a_template_can_make_it_does_no_harm() {
    let deep = "[".repeat(60) + "x" + &"]".repeat(60);
    let sets = format!("{{% set x = {deep} %}}").repeat(30);
    for end in [
        "{{ x == y }}",
        "{{ [x, y]|sort }}",
        "{{ [x, y]|unique|list|length }}",
        "{{ '' ~ x }}",
        "{{ x|tojson }}",
        "{{ x is eq(y) }}",
    ] {
        let text = format!(
            "{{% macro m(x, y, n) %}}{sets}{{% if n %}}{{{{ m(x, x, n - 1) }}}}{{% else %}}{end}{{% endif %}}{{% endmacro %}}{{{{ m(1, 1, 30) }}}}"
        );
        if let Err(error) = render(&text) {
            assert!(help_for(&error).is_some(), "{end}: {error}");
        }
    }
}

/// Symbols in any order: what the plain engine says of them is said here too.
#[test]
fn random_templates_say_what_they_say_without_bounds() {
    // A word of the language stands with what follows it: a value of that name is nobody's.
    const SYMBOLS: &[&str] = &[
        "s",
        "x",
        "m",
        "1",
        "'a'",
        "0.5",
        "~",
        "~",
        "~",
        "+",
        "-",
        "*",
        "(s + s in x)",
        "(s in s ~ x)",
        "(s ~ 1 not in x)",
        "not s",
        "and s",
        "or x",
        "if m else 1",
        "if x",
        "is string and s",
        "is not defined or x",
        "(",
        ")",
        "[",
        "]",
        "{'k': s}",
        ",",
        ".k",
        "|upper",
        "|join('-')",
        "|length",
        "|default('d')",
        "==",
        "<",
        ".upper()",
        "[0]",
        "(s, 1)",
        "none",
        "|tojson",
        "loop.index",
        "ns.a",
    ];
    let mut state = 1_u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut said = 0;
    for _ in 0..60_000 {
        let body: Vec<&str> = (0..1 + draw(8)).map(|_| SYMBOLS[draw(SYMBOLS.len())]).collect();
        let body = body.join(" ");
        let text = match draw(6) {
            0 => format!("{{% set ns = namespace(a=1) %}}{{% set ns.a = {body} %}}{{{{ ns.a }}}}"),
            1 => format!("{{% for y in {body} %}}{{{{ y ~ s }}}}{{% endfor %}}"),
            2 => format!("{{% if {body} %}}yes{{% else %}}no{{% endif %}}"),
            3 => format!("{{% macro f(a, b=s ~ 1) %}}{{{{ a ~ b }}}}{{% endmacro %}}{{{{ f({body}) }}}}"),
            _ => format!("{{{{ {body} }}}}"),
        };
        let (plain, bounded) = (plain_render(&text), render(&text));
        said += usize::from(plain.is_ok());
        match (plain, bounded) {
            (Ok(plain), Ok(bounded)) => assert_eq!(plain, bounded, "{text}"),
            (Err(_), Err(_)) => {}
            (plain, bounded) => panic!("{text}: {plain:?} became {bounded:?}\n{}", scan::scan(&text).text),
        }
    }
    assert!(said > 3_000, "{said}");
}
