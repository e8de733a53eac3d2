//! A table at the end of a run: a line for each call, a column for each size.

/// Cells come in any order. Lines stay in the order of their first cells; columns are sorted.
pub struct Table {
    title: String,
    line_width: usize,
    column_width: usize,
    cells: Vec<Cell>,
}

struct Cell {
    line: String,
    column: usize,
    text: String,
}

/// The last column, for calls with sequences of several lengths.
pub const PACKED: usize = usize::MAX;

impl Table {
    pub fn new(title: &str, (line_width, column_width): (usize, usize)) -> Self {
        Self { title: title.to_string(), line_width, column_width, cells: Vec::new() }
    }

    pub fn add(&mut self, line: String, column: usize, text: String) {
        self.cells.push(Cell { line, column, text });
    }

    /// Prints the table, unless it is empty.
    pub fn print(&self) {
        let mut lines: Vec<&str> = Vec::new();
        for cell in &self.cells {
            if !lines.contains(&cell.line.as_str()) {
                lines.push(&cell.line);
            }
        }
        let mut columns: Vec<usize> = self.cells.iter().map(|cell| cell.column).collect();
        columns.sort_unstable();
        columns.dedup();
        if lines.is_empty() {
            return;
        }
        let head = |&column: &usize| if column == PACKED { "packed".to_string() } else { column.to_string() };
        self.print_line(&self.title, columns.iter().map(head), "\n");
        for line in lines {
            let text = |&column: &usize| {
                let cell = self.cells.iter().find(|cell| cell.line == line && cell.column == column);
                cell.map_or("-".to_string(), |cell| cell.text.clone())
            };
            self.print_line(line, columns.iter().map(text), "");
        }
    }

    fn print_line(&self, first: &str, texts: impl Iterator<Item = String>, before: &str) {
        let texts: String = texts.map(|text| format!(" {text:>width$}", width = self.column_width)).collect();
        println!("{before}{first:<width$}{texts}", width = self.line_width);
    }
}
