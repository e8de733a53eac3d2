//! Tests the imports among the files of src. The rooms have an order. A file imports only its own room and lower rooms, and there is
//! no circle of imports. docs/architecture.md shows the graph.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};

use super::{root, update};

/// The rooms of src, lowest first: files and folders next to lib.rs. A room imports only rooms before it in this list.
const ROOMS: [&str; 21] = [
    "layout",
    "mask",
    "tensors",
    "output",
    "instances",
    "error",
    "padding",
    "packed",
    "options",
    "problem",
    "plan",
    "environment",
    "cpu",
    "cuda",
    "device",
    "op",
    "merge",
    "attention",
    "layers",
    "testing",
    // It re-exports the public names.
    "lib",
];

#[test]
fn src_has_no_circle_and_no_import_runs_up() -> Result<()> {
    Graph::of(&sources()?)?.check(&ROOMS)
}

#[test]
fn the_import_graph_is_up_to_date() -> Result<()> {
    let (document, begin, end) = ("docs/architecture.md", "<!-- table: imports -->\n", "<!-- end -->");
    let text = fs::read_to_string(root().join(document))?;
    let missing = || format!("{document} must have a line <!-- table: imports --> and after it <!-- end -->");
    let (before, rest) = text.split_once(begin).with_context(missing)?;
    let (shown, after) = rest.split_once(end).with_context(missing)?;
    let graph = format!("```text\n{}```\n", Graph::of(&sources()?)?.text(&ROOMS));
    if update() {
        fs::write(root().join(document), [before, begin, &graph, end, after].concat())?;
    } else {
        ensure!(shown == graph, "{document} is stale; `just tables` rewrites the graph:\n{graph}");
    }
    Ok(())
}

/// The table of rooms has each room.
#[test]
fn the_document_describes_every_room() -> Result<()> {
    let (document, heading) = ("docs/architecture.md", "\n## The rooms of src\n");
    let text = fs::read_to_string(root().join(document))?;
    let (_, section) = text.split_once(heading).with_context(|| format!("{document} has no heading{heading}"))?;
    let (table, _) = section.split_once("\n## ").unwrap_or((section, ""));
    let first_cells = table.lines().filter_map(|line| line.split('|').nth(1));
    let described: Vec<&str> = first_cells.flat_map(|cell| cell.split(',')).map(str::trim).collect();
    for room in ROOMS {
        let names = [format!("`src/{room}`"), format!("`src/{room}.rs`")];
        let found = names.iter().any(|name| described.contains(&name.as_str()));
        ensure!(found, "the table of rooms in {document} has no {}; add it there", names.join(" or "));
    }
    Ok(())
}

/// Tests the check itself: it sees every form of an import, and every broken rule is an error.
#[test]
fn circles_and_imports_that_run_up_are_refused() -> Result<()> {
    let check = |files: &[(&str, &str)]| -> Result<String> {
        let files = files.iter().map(|(file, text)| (file.to_string(), text.to_string())).collect();
        let graph = Graph::of(&files)?;
        Ok(graph.check(&["low", "high", "lib"]).map_or_else(|error| error.to_string(), |()| "fine".to_string()))
    };
    let lib = ("lib.rs", "mod low; mod high; pub use low::{Low, Other as Alias};");
    let good = ("high.rs", "use crate::Low;");
    assert_eq!(
        check(&[lib, ("low.rs", "// crate::high\nstruct Low; const X: &str = \"crate::high\";"), good])?,
        "fine"
    );
    let up = "low imports high, which is in a higher room";
    for text in [
        "use crate::high::High;",
        "use crate::{high::{self, High}, Low};",
        "fn f() -> crate::high::High { todo!() }",
        "fn f<'a>(x: &'a str) { super::high::g('\"') }",
    ] {
        assert_eq!(check(&[lib, ("low.rs", text), good])?, up, "{text}");
    }
    // An import of a name that lib.rs re-exports is an import of the file that defines the name.
    assert_eq!(
        check(&[
            ("lib.rs", "mod low; mod high; pub use high::High;"),
            ("low.rs", "use crate::High;"),
            ("high.rs", "")
        ])?,
        up
    );
    let circle = [
        lib,
        good,
        ("low/mod.rs", "mod a; mod b; pub use self::a::A; fn f() { b::g() }"),
        ("low/a.rs", "use super::b::B;"),
        ("low/b.rs", "use super::A;"),
    ];
    assert_eq!(check(&circle)?, "a circle: low::a imports low::b imports low::a");
    let parent = [lib, good, ("low/mod.rs", "mod a; fn f() { a::g() }"), ("low/a.rs", "use super::f;")];
    assert_eq!(check(&parent)?, "a circle: low imports low::a imports low");
    assert_eq!(check(&[lib, ("low.rs", ""), good, ("new.rs", "")])?, "new is not in ROOMS; add it there");
    Ok(())
}

/// The files of src by their paths in it, and their texts.
type Sources = BTreeMap<String, String>;

fn sources() -> Result<Sources> {
    fn read(folder: &Path, name: &str, sources: &mut Sources) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let file = path.file_name().context("an entry has a name")?.to_string_lossy();
            let name = if name.is_empty() { file.to_string() } else { format!("{name}/{file}") };
            if path.is_dir() {
                read(&path, &name, sources)?;
            } else if file.ends_with(".rs") {
                sources.insert(name, fs::read_to_string(&path)?);
            }
        }
        Ok(())
    }
    let mut sources = Sources::new();
    read(&root().join("src"), "", &mut sources)?;
    Ok(sources)
}

/// A module as its path, such as `["cuda", "launch"]`; lib.rs is the empty path.
type Module = Vec<String>;

/// The imports of each module.
struct Graph(BTreeMap<Module, BTreeSet<Module>>);

impl Graph {
    fn of(sources: &Sources) -> Result<Self> {
        let modules: BTreeMap<Module, Vec<&str>> =
            sources.iter().map(|(file, text)| (module_of(file), tokens(text))).collect();
        let reexports = reexports(&modules);
        let mut graph = BTreeMap::new();
        for (module, tokens) in &modules {
            let imports =
                paths(module, &modules, tokens).into_iter().map(|path| resolve(&path.full, &modules, &reexports));
            graph.insert(module.clone(), imports.filter(|import| import != module).collect());
        }
        Ok(Self(graph))
    }

    /// # Errors
    /// If a module is in no room, if a file imports a file of a higher room, or if files import each other in a circle.
    fn check(&self, rooms: &[&str]) -> Result<()> {
        let place = |module: &Module| {
            let room = room(module);
            rooms.iter().position(|name| *name == room).with_context(|| format!("{room} is not in ROOMS; add it there"))
        };
        for (module, imports) in &self.0 {
            let own = place(module)?;
            for import in imports {
                let fine = place(import)? <= own;
                ensure!(fine, "{} imports {}, which is in a higher room", name(module), name(import));
            }
        }
        let mut done = BTreeSet::new();
        self.0.keys().try_for_each(|module| self.walk(module, &mut Vec::new(), &mut done))
    }

    /// Follows all imports of `module`, and fails at a circle. `before` is the chain of imports that leads to `module`. The modules in
    /// `done` lead into no circle.
    fn walk<'a>(
        &'a self,
        module: &'a Module,
        before: &mut Vec<&'a Module>,
        done: &mut BTreeSet<&'a Module>,
    ) -> Result<()> {
        if let Some(at) = before.iter().position(|earlier| *earlier == module) {
            let circle: Vec<String> = before[at..].iter().chain([&module]).map(|module| name(module)).collect();
            bail!("a circle: {}", circle.join(" imports "));
        }
        if done.contains(module) {
            return Ok(());
        }
        before.push(module);
        for import in &self.0[module] {
            self.walk(import, before, done)?;
        }
        before.pop();
        done.insert(module);
        Ok(())
    }

    /// A line for each room with the rooms that it imports. Below it, a line for each file of the room with the files of the room that
    /// it imports.
    fn text(&self, rooms: &[&str]) -> String {
        let mut text = String::new();
        for wanted in rooms {
            let of_room = || self.0.iter().filter(|(module, _)| room(module) == *wanted);
            let imported: BTreeSet<&str> = of_room().flat_map(|(_, imports)| imports).map(room).collect();
            let below = rooms.iter().copied().filter(|room| room != wanted && imported.contains(room));
            text += &line(wanted, below.map(String::from));
            for (module, imports) in of_room().filter(|(module, _)| module.len() > 1) {
                let inside = imports.iter().filter(|import| room(import) == *wanted);
                text += &line(&format!("  {}", module[1..].join("::")), inside.map(|import| import[1..].join("::")));
            }
        }
        text
    }
}

fn line(name: &str, imports: impl Iterator<Item = String>) -> String {
    let imports: Vec<String> = imports.collect();
    format!("{name:18}{}", imports.join(", ")).trim_end().to_string() + "\n"
}

fn room(module: &Module) -> &str {
    module.first().map_or("lib", String::as_str)
}

fn name(module: &Module) -> String {
    if module.is_empty() {
        "lib".to_string()
    } else {
        module.join("::")
    }
}

/// The module of a file: `cuda/launch.rs` and `cuda/mod.rs` are `cuda::launch` and `cuda`.
fn module_of(file: &str) -> Module {
    let path = file.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" {
        Module::new()
    } else {
        path.split('/').map(String::from).collect()
    }
}

/// The words, `::` and other signs of Rust code, without comments, strings and characters.
fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let (len, kept) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), false)
        } else if first == '"' {
            (1 + quoted(&rest[1..], '"'), false)
        } else if first == '\'' && (rest[1..].starts_with('\\') || rest[1..].chars().nth(1) == Some('\'')) {
            (1 + quoted(&rest[1..], '\''), false) // not a lifetime
        } else if is_word(first) {
            (rest.find(|c| !is_word(c)).unwrap_or(rest.len()), true)
        } else if rest.starts_with("::") {
            (2, true)
        } else {
            (first.len_utf8(), !first.is_whitespace())
        };
        if kept {
            tokens.push(&rest[..len]);
        }
        rest = &rest[len..];
    }
    tokens
}

/// The length of a quoted text, up to and including `quote`.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// A path in a module's code that names a module of src, or an item in one.
struct CodePath {
    /// From the root of the crate.
    full: Vec<String>,
    /// The name of the path's target after the import.
    alias: String,
    /// Whether the path is in a `pub use`.
    reexported: bool,
}

/// The paths in `module` that begin with `crate`, `super`, `self`, or one of its own modules.
fn paths(module: &Module, modules: &BTreeMap<Module, Vec<&str>>, tokens: &[&str]) -> Vec<CodePath> {
    let child = |word: &str| modules.contains_key(&[&module[..], &[word.to_string()]].concat());
    let mut found = Vec::new();
    for at in 0..tokens.len().saturating_sub(1) {
        let begins = matches!(tokens[at], "crate" | "super" | "self") || child(tokens[at]);
        if begins && tokens[at + 1] == "::" && (at == 0 || tokens[at - 1] != "::") {
            let mut end = at;
            let mut tree = Vec::new();
            use_tree(tokens, &mut end, &[], &mut tree);
            let reexported = at > 0 && tokens[at - 1] == "use" && at > 1 && matches!(tokens[at - 2], "pub" | ")");
            found.extend(tree.into_iter().map(|(path, alias)| CodePath {
                full: full(module, &path),
                alias,
                reexported,
            }));
        }
    }
    found
}

/// Adds the paths of the use tree at `at` to `found`, each with its name after the import. Moves `at` past the tree.
fn use_tree(tokens: &[&str], at: &mut usize, before: &[&str], found: &mut Vec<(Vec<String>, String)>) {
    let token = |at: usize| tokens.get(at).copied().unwrap_or_default();
    if token(*at) == "{" {
        *at += 1;
        while !matches!(token(*at), "}" | "") {
            use_tree(tokens, at, before, found);
            if token(*at) == "," {
                *at += 1;
            }
        }
        *at += 1;
        return;
    }
    let path = [before, &[token(*at)]].concat();
    *at += 1;
    let goes_on = |next: &str| next == "{" || next.starts_with(|c: char| c.is_alphabetic() || c == '_');
    if token(*at) == "::" && goes_on(token(*at + 1)) {
        *at += 1;
        return use_tree(tokens, at, &path, found);
    }
    let mut alias = path.last().copied().unwrap_or_default();
    if token(*at) == "as" {
        alias = token(*at + 1);
        *at += 2;
    }
    found.push((path.iter().map(|word| word.to_string()).collect(), alias.to_string()));
}

/// A path of `module` from the root of the crate.
fn full(module: &Module, path: &[String]) -> Vec<String> {
    let mut full = module.clone();
    for word in path {
        match word.as_str() {
            "crate" => full.clear(),
            "self" => {}
            "super" => drop(full.pop()),
            _ => full.push(word.clone()),
        }
    }
    full
}

/// The target of each `pub use`, by the path that other modules import.
fn reexports(modules: &BTreeMap<Module, Vec<&str>>) -> BTreeMap<Vec<String>, Vec<String>> {
    let of_module = |(module, tokens): (&Module, &Vec<&str>)| -> Vec<(Vec<String>, Vec<String>)> {
        let reexported = paths(module, modules, tokens).into_iter().filter(|path| path.reexported);
        reexported.map(|path| ([&module[..], &[path.alias]].concat(), path.full)).collect()
    };
    modules.iter().flat_map(of_module).collect()
}

/// The module that defines the target of a path from the root.
fn resolve(
    path: &[String],
    modules: &BTreeMap<Module, Vec<&str>>,
    reexports: &BTreeMap<Vec<String>, Vec<String>>,
) -> Module {
    let depth = (0..=path.len()).rev().find(|&depth| modules.contains_key(&path[..depth])).unwrap_or(0);
    let item = &path[..path.len().min(depth + 1)];
    match reexports.get(item) {
        Some(origin) if depth < path.len() && origin != item => resolve(origin, modules, reexports),
        _ => path[..depth].to_vec(),
    }
}
