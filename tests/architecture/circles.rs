//! Which file names what another file defines, and whether that runs in a circle. Names are resolved as the compiler
//! does, as far as it matters here: through `use`, through re-exports to the file that defines the name, through
//! modules written in full. A method call names no file, a `mod x;` neither, nor does a re-export as long as the file
//! that re-exports does not use the name itself: it only says where a name is to be found.

use petgraph::algo::tarjan_scc;
use petgraph::graph::DiGraph;
use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Macro, UseTree, Visibility};

/// The texts of files, by their path below the root, as `src/lib.rs`.
pub type Sources = BTreeMap<PathBuf, String>;

/// One file names what another defines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Arrow {
    from: PathBuf,
    to: PathBuf,
    line: usize,
    name: String,
}

/// Files that can all be reached from each other, and the arrows among them.
#[derive(Debug)]
pub struct Circle {
    pub files: BTreeSet<PathBuf>,
    arrows: Vec<Arrow>,
}

impl Circle {
    /// Each arrow with the names that make it, and where each is met first.
    pub fn told(&self) -> String {
        let mut text = format!("a circle of {} files\n", self.files.len());
        let mut before = None;
        let mut told = BTreeSet::new();
        for Arrow { from, to, line, name } in &self.arrows {
            if before.replace((from, to)) != Some((from, to)) {
                let _ = writeln!(text, "  {} -> {}", from.display(), to.display());
                told.clear();
            }
            if told.insert(name.rsplit("::").next()) {
                let _ = writeln!(text, "      {}:{line} `{name}`", from.display());
            }
        }
        text
    }
}

/// The circles among the files of a library and of the binary that uses it under the name `library`.
pub fn circles(sources: &Sources, library: &str) -> Vec<Circle> {
    let arrows = arrows(sources, library);
    let mut graph = DiGraph::new();
    let places: BTreeMap<&PathBuf, _> = sources.keys().map(|file| (file, graph.add_node(file))).collect();
    for arrow in &arrows {
        graph.add_edge(places[&arrow.from], places[&arrow.to], ());
    }
    let mut found = Vec::new();
    for component in tarjan_scc(&graph).into_iter().filter(|component| component.len() > 1) {
        let files: BTreeSet<PathBuf> = component.into_iter().map(|node| graph[node].clone()).collect();
        let inside = |arrow: &&Arrow| files.contains(&arrow.from) && files.contains(&arrow.to);
        let arrows = arrows.iter().filter(inside).cloned().collect();
        found.push(Circle { files, arrows });
    }
    found.sort_by(|a, b| a.files.cmp(&b.files));
    found
}

/// What a name stands for in a module.
#[derive(Clone)]
enum Meaning {
    /// Defined right there.
    Item,
    Module(usize),
    /// Brought in by `use`, from where this path leads.
    Import(Vec<String>),
}

/// A path that is written somewhere, and where.
struct Mention {
    path: Vec<String>,
    line: usize,
    /// `use x::*`, which is an arrow to all of the module.
    is_glob: bool,
}

struct Module {
    file: PathBuf,
    parent: Option<usize>,
    root: usize,
    names: BTreeMap<String, Vec<Meaning>>,
    globs: Vec<Vec<String>>,
    mentions: Vec<Mention>,
}

/// All modules of the two crates.
struct Tree<'s> {
    sources: &'s Sources,
    library: &'s str,
    modules: Vec<Module>,
    library_root: Option<usize>,
}

/// Where a path leads.
#[derive(Clone, Copy)]
enum Target {
    /// What this module's file defines.
    Item(usize),
    Module(usize),
}

fn arrows(sources: &Sources, library: &str) -> BTreeSet<Arrow> {
    let mut tree = Tree { sources, library, modules: Vec::new(), library_root: None };
    tree.library_root = tree.root("src/lib.rs");
    tree.root("src/main.rs");
    let mut arrows = BTreeSet::new();
    for (at, module) in tree.modules.iter().enumerate() {
        for Mention { path, line, is_glob } in &module.mentions {
            let to = match tree.resolve(at, path, 0) {
                Some(Target::Item(to)) => to,
                Some(Target::Module(to)) if *is_glob => to,
                _ => continue,
            };
            let (from, to) = (module.file.clone(), tree.modules[to].file.clone());
            if from != to {
                arrows.insert(Arrow { from, to, line: *line, name: path.join("::") });
            }
        }
    }
    arrows
}

impl Tree<'_> {
    fn root(&mut self, file: &str) -> Option<usize> {
        let file = PathBuf::from(file);
        self.sources.contains_key(&file).then(|| self.file(file.clone(), file.with_file_name(""), None))
    }

    /// The module that is a file's; `folder` is where the files of its modules lie.
    fn file(&mut self, file: PathBuf, folder: PathBuf, parent: Option<usize>) -> usize {
        let text = &self.sources[&file];
        let parsed = syn::parse_file(text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.module(file, folder, parent, &parsed.items)
    }

    fn module(&mut self, file: PathBuf, folder: PathBuf, parent: Option<usize>, items: &[Item]) -> usize {
        let at = self.modules.len();
        let root = parent.map_or(at, |parent| self.modules[parent].root);
        let empty = BTreeMap::new();
        self.modules.push(Module {
            file: file.clone(),
            parent,
            root,
            names: empty,
            globs: Vec::new(),
            mentions: Vec::new(),
        });
        let mut reader = Reader::default();
        items.iter().for_each(|item| reader.item(item));
        for inner in std::mem::take(&mut reader.modules) {
            let name = inner.ident.to_string();
            let below = folder.join(&name);
            let module = match &inner.content {
                Some((_, items)) => self.module(file.clone(), below, Some(at), items),
                None => {
                    let places = [folder.join(format!("{name}.rs")), below.join("mod.rs")];
                    let found = places.into_iter().find(|place| self.sources.contains_key(place));
                    let found = found.unwrap_or_else(|| panic!("{}: no file of `mod {name}`", file.display()));
                    self.file(found, below, Some(at))
                }
            };
            reader.names.entry(name).or_default().push(Meaning::Module(module));
        }
        let Reader { names, globs, mentions, .. } = reader;
        let module = &mut self.modules[at];
        (module.names, module.globs, module.mentions) = (names, globs, mentions);
        at
    }

    fn resolve(&self, from: usize, path: &[String], depth: usize) -> Option<Target> {
        let (first, rest) = path.split_first()?;
        let module = &self.modules[from];
        let start = match first.as_str() {
            "crate" => Target::Module(module.root),
            "self" => Target::Module(from),
            "super" => Target::Module(module.parent?),
            name => match self.named(from, name, rest.is_empty(), depth) {
                Some(target) => target,
                None if name == self.library && Some(module.root) != self.library_root => {
                    Target::Module(self.library_root?)
                }
                None => return None,
            },
        };
        self.walk(start, rest, depth)
    }

    fn walk(&self, start: Target, rest: &[String], depth: usize) -> Option<Target> {
        // What is inside an item, as a variant or a method, is in its file.
        let (Target::Module(module), Some((name, rest))) = (start, rest.split_first()) else { return Some(start) };
        if name == "super" {
            return self.walk(Target::Module(self.modules[module].parent?), rest, depth);
        }
        match self.named(module, name, rest.is_empty(), depth) {
            Some(target) => self.walk(target, rest, depth),
            // Made by a macro, perhaps: it is that file's in any case.
            None => Some(Target::Item(module)),
        }
    }

    /// A name can be both a module's and an item's: at the end of a path the item is meant.
    fn named(&self, module: usize, name: &str, is_last: bool, depth: usize) -> Option<Target> {
        // Imports that lead to each other lead nowhere.
        if depth > 16 {
            return None;
        }
        let mut targets = Vec::new();
        for meaning in self.modules[module].names.get(name).into_iter().flatten() {
            targets.extend(match meaning {
                Meaning::Item => Some(Target::Item(module)),
                Meaning::Module(inner) => Some(Target::Module(*inner)),
                Meaning::Import(path) if path.len() == 1 && path[0] == name => None,
                Meaning::Import(path) => self.resolve(module, path, depth + 1),
            });
        }
        let wanted = targets.iter().find(|target| matches!(target, Target::Item(_)) == is_last);
        if let Some(target) = wanted.or(targets.first()) {
            return Some(*target);
        }
        self.modules[module].globs.iter().find_map(|glob| match self.resolve(module, glob, depth + 1)? {
            Target::Module(inner) if inner != module => self.named(inner, name, is_last, depth + 1),
            _ => None,
        })
    }
}

/// What one module says, without the modules in it.
#[derive(Default)]
struct Reader<'f> {
    names: BTreeMap<String, Vec<Meaning>>,
    globs: Vec<Vec<String>>,
    mentions: Vec<Mention>,
    modules: Vec<&'f ItemMod>,
}

impl<'f> Reader<'f> {
    /// An item of the module itself, which gives it a name.
    fn item(&mut self, item: &'f Item) {
        let name = match item {
            Item::Const(item) => Some(&item.ident),
            Item::Enum(item) => Some(&item.ident),
            Item::Fn(item) => Some(&item.sig.ident),
            Item::Macro(item) => item.ident.as_ref(),
            Item::Static(item) => Some(&item.ident),
            Item::Struct(item) => Some(&item.ident),
            Item::Trait(item) => Some(&item.ident),
            Item::Type(item) => Some(&item.ident),
            Item::Union(item) => Some(&item.ident),
            _ => None,
        };
        if let Some(name) = name {
            self.names.entry(name.to_string()).or_default().push(Meaning::Item);
        }
        self.visit_item(item);
    }

    fn used(&mut self, tree: &UseTree, before: &[String], is_re_export: bool) {
        let with = |name: String| [before, &[name]].concat();
        let (name, path, span) = match tree {
            UseTree::Path(path) => return self.used(&path.tree, &with(path.ident.to_string()), is_re_export),
            UseTree::Group(group) => return group.items.iter().for_each(|tree| self.used(tree, before, is_re_export)),
            UseTree::Glob(glob) => {
                self.globs.push(before.to_vec());
                let line = glob.star_token.spans[0].start().line;
                self.mentions.push(Mention { path: before.to_vec(), line, is_glob: true });
                return;
            }
            UseTree::Name(name) => (name.ident.to_string(), with(name.ident.to_string()), name.ident.span()),
            UseTree::Rename(name) => (name.rename.to_string(), with(name.ident.to_string()), name.ident.span()),
        };
        // `use a::{self}` means `a`.
        let (name, path) = match path.split_last() {
            Some((last, [.., module])) if last == "self" => {
                (if name == "self" { module.clone() } else { name }, path[..path.len() - 1].to_vec())
            }
            _ => (name, path),
        };
        if !is_re_export {
            self.mentions.push(Mention { path: path.clone(), line: span.start().line, is_glob: false });
        }
        self.names.entry(name).or_default().push(Meaning::Import(path));
    }

    /// What is inside a macro is text to the compiler's parser, and to this one: `a::b` in it is a path nevertheless.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(sign)) if sign.as_char() == ':');
        let colons = |at: usize| colon(at) && colon(at + 1);
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(first) if at < 2 || !colons(at - 2) => {
                    let mut path = vec![first.to_string()];
                    while colons(at + 1)
                        && let Some(TokenTree::Ident(next)) = tokens.get(at + 3)
                    {
                        path.push(next.to_string());
                        at += 3;
                    }
                    let line = first.span().start().line;
                    self.mentions.push(Mention { path, line, is_glob: false });
                }
                _ => {}
            }
            at += 1;
        }
    }
}

fn only_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let list = attribute.meta.require_list().ok().filter(|list| list.path.is_ident("cfg"));
        list.is_some_and(|list| list.tokens.to_string() == "test")
    })
}

impl<'f> Visit<'f> for Reader<'f> {
    fn visit_item_mod(&mut self, module: &'f ItemMod) {
        if !only_for_tests(&module.attrs) {
            self.modules.push(module);
        }
    }

    fn visit_item_use(&mut self, import: &'f ItemUse) {
        if import.leading_colon.is_none() && !only_for_tests(&import.attrs) {
            self.used(&import.tree, &[], !matches!(import.vis, Visibility::Inherited));
        }
    }

    fn visit_path(&mut self, path: &'f syn::Path) {
        if path.leading_colon.is_none() {
            let line = path.segments[0].ident.span().start().line;
            let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.mentions.push(Mention { path: names, line, is_glob: false });
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'f Macro) {
        self.tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }
}

/// The circles of a planted library, told: which files, and the arrows with the names that make them.
#[cfg(test)]
fn planted(files: &[(&str, &str)]) -> Vec<String> {
    let sources = files.iter().map(|(file, text)| (PathBuf::from(file), text.to_string())).collect();
    circles(&sources, "planted").iter().map(Circle::told).collect()
}

#[test]
fn a_circle_is_told_arrow_by_arrow_and_a_re_export_is_followed_to_who_defines_the_name() {
    let found = planted(&[
        ("src/lib.rs", "mod a;"),
        // In no circle: it names its children and only says where their names are.
        ("src/a/mod.rs", "mod one; mod three; mod two;\npub use one::One;\npub use two::*;"),
        ("src/a/one.rs", "use super::Two;\npub struct One(Two);"),
        ("src/a/two.rs", "pub struct Two;\nfn f() { crate::a::three::THREE; }"),
        ("src/a/three.rs", "pub const THREE: usize = 3;\n\nfn f(_: &super::One) {}\nfn g() { super::One::new(); }"),
    ]);
    let wanted = "\
a circle of 3 files
  src/a/one.rs -> src/a/two.rs
      src/a/one.rs:1 `super::Two`
  src/a/three.rs -> src/a/one.rs
      src/a/three.rs:3 `super::One`
      src/a/three.rs:4 `super::One::new`
  src/a/two.rs -> src/a/three.rs
      src/a/two.rs:2 `crate::a::three::THREE`
";
    assert_eq!(found, [wanted]);
}

#[test]
fn a_name_is_found_in_whatever_way_it_is_written() {
    let back = [
        "use crate::one::*;",
        "use super::one::{self, One as Another};",
        "use crate::one as other; fn f() { other::work(); }",
        "fn f() { use super::one as other; other::work(); }",
        "fn f(x: crate::one::One) {}",
        "fn f() { if let Some(super::one::One::A) = g() {} }",
        "fn f() { format!(\"{}\", crate::one::work()); }",
        "fn f() { assert!([0].map(|_| super::one::made_by_a_macro()).is_empty()); }",
        "impl crate::one::Trait for u8 {}",
        "mod inner { use super::super::one::One; }",
        "pub use crate::one::One; fn f() -> One { g() }",
        "use crate::{three::One}; ",
    ];
    for two in back {
        let found = planted(&[
            ("src/lib.rs", "mod one; mod two; mod three;"),
            ("src/one.rs", "use crate::two::Two; pub enum One { A } pub trait Trait {} pub fn work() {}"),
            ("src/two.rs", &format!("pub struct Two; {two}")),
            ("src/three.rs", "pub use crate::one::*;"),
        ]);
        assert!(found.len() == 1 && found[0].starts_with("a circle of 2 files"), "{two}: {found:?}");
    }
}

#[test]
fn what_names_nothing_makes_no_circle() {
    let back = [
        "// use crate::one::One;",
        "const TEXT: &str = \"crate::one::One\";",
        "/** `crate::one::One` */ fn f() {}",
        "#[cfg(test)] mod tests { use crate::one::One; }",
        "#[cfg(test)] mod tests;",
        "fn f(x: &X) { x.work(); x.one.work::<u8>(); }",
        "pub use crate::one::One;",
        "use crate::one;",
        "fn f(one: One) -> one::One { std::one::work() }",
        "use ::one::One;",
    ];
    for two in back {
        let found = planted(&[
            ("src/lib.rs", "mod one; mod two;"),
            ("src/one.rs", "use crate::two::Two; pub enum One { A } pub fn work() {}"),
            ("src/two.rs", &format!("pub struct Two; {two}")),
        ]);
        assert!(found.is_empty(), "{two}: {found:?}");
    }
}

#[test]
fn the_binary_and_its_library_are_two_trees() {
    let found = planted(&[
        ("src/lib.rs", "pub mod a; pub mod b;"),
        ("src/a.rs", "use crate::b::B; pub struct A;"),
        ("src/b.rs", "pub struct B; fn cli() {}"),
        ("src/main.rs", "mod cli; fn main() { cli::main() }"),
        ("src/cli/mod.rs", "mod b; mod c; pub use c::Shared; pub fn main() { b::run() }"),
        ("src/cli/b.rs", "use planted::a::A; use super::c::Shared; use crate::cli::main; pub fn run() {}"),
        ("src/cli/c.rs", "use planted::b::B; pub struct Shared;"),
    ]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("a circle of 2 files\n  src/cli/b.rs -> src/cli/mod.rs\n"), "{}", found[0]);
}
