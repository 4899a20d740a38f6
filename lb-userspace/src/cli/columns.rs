//! Text for people in aligned columns, coloured where that is wanted.

use std::io::IsTerminal;

use ratatui::text::Span;

use super::args::ColorChoice;
use super::process::environment;

/// The meaning of a text, which decides on its colour. What it means is in its words as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// No colour.
    #[default]
    Plain,
    /// All is well.
    Good,
    /// It works, though not as it should for long.
    Warning,
    /// It doesn't work.
    Bad,
    /// What a reader looks for.
    Strong,
}

/// Colours or none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Palette {
    is_coloured: bool,
}

impl Palette {
    /// For stdout (no-color.org).
    pub fn of_stdout(choice: ColorChoice) -> Palette {
        let is_unset = |name| environment(name).is_none_or(|value| value.is_empty());
        let is_coloured = match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                let is_dumb = environment("TERM").as_deref() == Some("dumb");
                std::io::stdout().is_terminal() && is_unset("NO_COLOR") && !is_dumb
            }
        };
        Palette { is_coloured }
    }

    /// The text in the colour of its tone.
    pub fn paint(self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "1;31",
            Tone::Strong => "1",
        };
        match self.is_coloured && !text.is_empty() {
            true => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
            false => text.to_owned(),
        }
    }
}

/// A cell of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A text with its tone.
    pub fn new(text: impl Into<String>, tone: Tone) -> Cell {
        Cell { text: text.into(), tone }
    }

    /// The columns of a terminal that it takes: two for a wide character.
    fn width(&self) -> usize {
        Span::raw(&self.text).width()
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::new(text, Tone::Plain)
    }
}

/// A line of each row. A column is as wide as its longest cell; one that is empty in all rows has no
/// room, and the last cell of a row may be of any length.
pub fn lines(rows: &[Vec<Cell>], palette: Palette) -> Vec<String> {
    let mut widths = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        let cells = row.iter().take(row.len().saturating_sub(1));
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = cell.width().max(*width);
        }
    }
    let line = |row: &Vec<Cell>| {
        let mut line = String::new();
        let mut pending = 0;
        for (cell, width) in row.iter().zip(&widths) {
            let length = cell.width();
            if length > 0 {
                line.extend(std::iter::repeat_n(' ', pending));
                line.push_str(&palette.paint(&cell.text, cell.tone));
                pending = 0;
            }
            if *width > 0 {
                pending += width.saturating_sub(length) + 2;
            }
        }
        line
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_need_to_be() {
        let rows = [
            vec!["web".into(), "".into(), "7".into(), "a long text at the end".into()],
            vec!["ä".into(), "".into(), "123".into(), "".into()],
            vec!["helloworld".into(), "".into(), "".into(), "x".into()],
            vec!["日本".into(), "".into(), "8".into(), "e\u{301}".into()],
        ];
        assert_eq!(
            lines(&rows, Palette::default()),
            [
                "web         7    a long text at the end",
                "ä           123",
                "helloworld       x",
                "日本        8    e\u{301}",
            ]
        );
        assert!(lines(&[], Palette::default()).is_empty());
    }

    #[test]
    fn colours_take_no_room() {
        let palette = Palette { is_coloured: true };
        let row = vec![Cell::new("up", Tone::Good), "x".into()];
        let wide = vec!["ejected".into(), "y".into()];
        assert_eq!(lines(&[row, wide], palette), ["\u{1b}[32mup\u{1b}[0m       x", "ejected  y"]);
        assert_eq!(palette.paint("", Tone::Bad), "");
        assert_eq!(Palette::of_stdout(ColorChoice::Never).paint("x", Tone::Bad), "x");
    }
}
