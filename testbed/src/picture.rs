//! What a terminal shows, as a picture: SVG.

use std::fmt::Write;

use vt100::{Cell, Color, Screen};

/// The size of a character, in pixels.
const WIDTH: f64 = 8.4;
const HEIGHT: u16 = 18;
/// The space around the text.
const MARGIN: u16 = 12;

/// The colours of a terminal: background, text, and the sixteen that programs name.
const BACKGROUND: &str = "#1c1f26";
const TEXT: &str = "#d7dae0";
const PALETTE: [&str; 16] = [
    "#3f4451", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#d7dae0",
    "#7f848e", "#f07178", "#a5e075", "#f0d399", "#77c0ff", "#de8ef2", "#6fd1de", "#ffffff",
];

/// The look of a character.
#[derive(Clone, PartialEq, Eq)]
struct Look {
    text: String,
    background: Option<String>,
    is_bold: bool,
}

impl Look {
    fn of(cell: &Cell) -> Look {
        let (mut text, mut background) = (color(cell.fgcolor()), color(cell.bgcolor()));
        if cell.inverse() {
            (text, background) = (
                background.or_else(|| Some(BACKGROUND.to_owned())),
                text.or_else(|| Some(TEXT.to_owned())),
            );
        }
        let text = text.unwrap_or_else(|| TEXT.to_owned());
        Look { text, background, is_bold: cell.bold() }
    }
}

fn color(color: Color) -> Option<String> {
    match color {
        Color::Default => None,
        Color::Idx(idx) => PALETTE.get(usize::from(idx)).map(|&it| it.to_owned()),
        Color::Rgb(red, green, blue) => Some(format!("#{red:02x}{green:02x}{blue:02x}")),
    }
}

/// A screen with its last empty rows left out. `title` is for those who can't see it.
pub fn svg(screen: &Screen, title: &str) -> String {
    let (n_rows, n_columns) = screen.size();
    let (n_rows, n_columns) = (n_rows.get(), n_columns.get());
    let is_used = |row: &u16| {
        screen.rows(0, n_columns).nth(usize::from(*row)).is_some_and(|it| !it.is_empty())
    };
    let n_rows = (0..n_rows).rev().find(is_used).map_or(1, |last| last + 1);
    let width = f64::from(n_columns) * WIDTH + f64::from(2 * MARGIN);
    let height = n_rows * HEIGHT + 2 * MARGIN;
    let title = escape(title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height}\" role=\"img\" \
         font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"6\" fill=\"{BACKGROUND}\"/>\n"
    );
    for row in 0..n_rows {
        draw_row(&mut svg, screen, row, n_columns);
    }
    svg + "</svg>\n"
}

/// Draws runs of characters that look the same, each as wide as its characters are, whatever the font.
fn draw_row(svg: &mut String, screen: &Screen, row: u16, n_columns: u16) {
    let mut runs: Vec<(u16, Look, String)> = Vec::new();
    for column in 0..n_columns {
        let Some(cell) = screen.cell(row, column) else { continue };
        let (look, text) = (Look::of(cell), cell.contents());
        let text = if text.is_empty() { " " } else { text };
        match runs.last_mut() {
            Some((_, last, run)) if *last == look => run.push_str(text),
            _ => runs.push((column, look, text.to_owned())),
        }
    }
    for (column, look, text) in runs {
        let (x, y) = (f64::from(column) * WIDTH + f64::from(MARGIN), row * HEIGHT + MARGIN);
        if let Some(background) = &look.background {
            let width = text.chars().count() as f64 * WIDTH;
            // Writing to a string can't fail.
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{HEIGHT}\" fill=\"{background}\"/>"
            );
        }
        let text = text.trim_end();
        if text.is_empty() {
            continue;
        }
        let width = text.chars().count() as f64 * WIDTH;
        let bold = if look.is_bold { " font-weight=\"bold\"" } else { "" };
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{}\" fill=\"{}\"{bold} textLength=\"{width:.1}\" \
             lengthAdjust=\"spacingAndGlyphs\" xml:space=\"preserve\">{}</text>",
            y + HEIGHT - 5,
            look.text,
            escape(text)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_their_colours_and_places() {
        let mut parser = vt100::Parser::new(
            std::num::NonZero::new(4).unwrap(),
            std::num::NonZero::new(20).unwrap(),
            0,
        );
        parser.process(b"\x1b[32mready\x1b[0m <&>\r\n\x1b[1;7mname\x1b[0m");
        let svg = svg(parser.screen(), "a & b");
        for part in [
            "viewBox=\"0 0 192 60\"",
            "<title>a &amp; b</title>",
            "fill=\"#98c379\" textLength=\"42.0\" lengthAdjust=\"spacingAndGlyphs\" xml:space=\"preserve\">ready<",
            "> &lt;&amp;&gt;</text>",
            "<rect x=\"12.0\" y=\"30\" width=\"33.6\" height=\"18\" fill=\"#d7dae0\"/>",
            "fill=\"#1c1f26\" font-weight=\"bold\"",
        ] {
            assert!(svg.contains(part), "no {part} in {svg}");
        }
    }
}
