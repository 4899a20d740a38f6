//! Elements of an SVG document, and how much room text needs.

use std::fmt::Write;

/// The picture's width; its height is what the content needs.
pub const WIDTH: f64 = 760.0;
/// Where content begins.
pub const LEFT: f64 = 24.0;
/// Where content ends.
pub const RIGHT: f64 = WIDTH - LEFT;

/// The size of labels, in pixels.
pub const LABEL: f64 = 12.0;

/// Elements drawn so far.
#[derive(Default)]
pub struct Canvas(String);

/// Which end of a text its position is.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    pub fn drawn(&self) -> &str {
        &self.0
    }

    pub fn text(&mut self, x: f64, y: f64, class: &str, anchor: Anchor, text: &str) {
        self.two_texts(x, y, class, anchor, text, "");
    }

    /// A text and, softly, another right behind it.
    pub fn two_texts(
        &mut self,
        x: f64,
        y: f64,
        class: &str,
        anchor: Anchor,
        text: &str,
        soft: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let soft = match soft {
            "" => String::new(),
            soft => format!("<tspan class=\"soft\">{}</tspan>", escape(soft)),
        };
        let text = escape(text);
        self.element(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">\
             {text}{soft}</text>"
        ));
    }

    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.element(format_args!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    pub fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        self.element(format_args!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" \
             height=\"{height:.1}\" rx=\"1.5\"/>"
        ));
    }

    pub fn path(&mut self, class: &str, path: &str) {
        self.element(format_args!("<path class=\"{class}\" d=\"{path}\"/>"));
    }

    /// A path whose origin is here.
    pub fn path_at(&mut self, x: f64, y: f64, class: &str, path: &str) {
        self.element(format_args!(
            "<path class=\"{class}\" transform=\"translate({x:.1} {y:.1})\" d=\"{path}\"/>"
        ));
    }

    /// Begins the elements of the contender of this index, in its hue.
    pub fn begin(&mut self, contender_idx: usize) {
        self.element(format_args!("<g class=\"h{contender_idx}\">"));
    }

    pub fn end(&mut self) {
        self.element(format_args!("</g>"));
    }

    fn element(&mut self, element: std::fmt::Arguments) {
        // Writing to a string does not fail.
        _ = writeln!(self.0, "{element}");
    }
}

/// Text as XML has it; what XML can't have is left out.
pub fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// About how wide a text is, in a font wider than most, since the reader's font is unknown.
pub fn width(text: &str, size: f64) -> f64 {
    let ems = text.chars().map(|c| match c {
        'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '\'' | '|' | ' ' | '·' => 0.33,
        'f' | 'r' | 't' | '(' | ')' | '/' | '-' => 0.42,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 0.96,
        'A'..='Z' => 0.72,
        '×' | '–' => 0.75,
        c if c.is_ascii() => 0.63,
        _ => 1.0,
    });
    ems.sum::<f64>() * size
}

/// Text in lines no wider than this, broken between words, and within one that is wider.
pub fn wrap(text: &str, size: f64, max: f64) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace().flat_map(|word| pieces(word, size, max)) {
        match lines.last_mut() {
            Some(line) if width(line, size) + width(" ", size) + width(&word, size) <= max => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

/// A word in pieces no wider than this, of a character at least.
fn pieces(word: &str, size: f64, max: f64) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for c in word.chars() {
        match pieces.last_mut() {
            Some(piece) if piece.is_empty() || width(&format!("{piece}{c}"), size) <= max => {
                piece.push(c);
            }
            _ => pieces.push(c.to_string()),
        }
    }
    pieces
}

/// A contender's name, no wider than this.
pub fn short(name: &str, max: f64) -> String {
    if width(name, LABEL) <= max {
        return name.to_owned();
    }
    let mut short = name.to_owned();
    while !short.is_empty() && width(&short, LABEL) + width("…", LABEL) > max {
        short.pop();
    }
    format!("{}…", short.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaping() {
        for (text, expected) in [
            ("a<b>&\"c\"", "a&lt;b&gt;&amp;&quot;c&quot;"),
            ("bell\u{7}", "bell "),
            ("µ – ×", "µ – ×"),
        ] {
            assert_eq!(escape(text), expected);
        }
    }

    #[test]
    fn wrapping() {
        for (text, max, expected) in [
            ("", 100.0, &[][..]),
            ("one two", 1000.0, &["one two"]),
            ("one two three", 60.0, &["one two", "three"]),
            ("a breakable", 40.0, &["a", "break", "able"]),
            ("ab", 1.0, &["a", "b"]),
        ] {
            assert_eq!(wrap(text, 12.0, max), expected, "{text} in {max}");
        }
    }
}
