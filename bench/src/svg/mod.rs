//! Pictures of a report, one for each name of a figure.
//!
//! Pure: text in, text out. A picture stands alone, with no font, script or style from elsewhere, and
//! follows the reader's choice of light or dark.

mod bars;
mod canvas;
mod curves;
mod palette;
mod scale;

use crate::report::{Better, Chart, Report};
use canvas::{Anchor, Canvas, LEFT, RIGHT, WIDTH, wrap};
use palette::Color;

/// A picture of the figures of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// That name.
    pub figure: String,
    /// The file's name without its ending, such as `2026-11-25-http-requests-s`.
    pub stem: String,
    /// The SVG document.
    pub svg: String,
}

/// Draws all figures of which anything was measured: curves where they are points on an axis, bars
/// else.
pub fn pictures(report: &Report) -> Vec<Picture> {
    let mut pictures: Vec<Picture> = vec![];
    for chart in report.charts().iter().filter(|chart| is_measured(chart)) {
        let stem = format!("{}-{}-{}", report.date, report.suite, slug(chart.name));
        // Two names may differ in what a slug lacks only.
        let n_same = pictures.iter().filter(|picture| slug(&picture.figure) == slug(chart.name));
        let stem = match n_same.count() {
            0 => stem,
            n => format!("{stem}-{}", n + 1),
        };
        pictures.push(Picture { figure: chart.name.to_owned(), stem, svg: draw(report, chart) });
    }
    pictures
}

fn is_measured(chart: &Chart) -> bool {
    let mut rows = chart.figures.iter().flat_map(|figure| &figure.rows);
    rows.any(|row| row.spread.is_some_and(|spread| spread.is_finite()))
}

/// A name in small letters and digits, with dashes between.
fn slug(name: &str) -> String {
    let name = name.to_lowercase();
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}

fn draw(report: &Report, chart: &Chart) -> String {
    let mut canvas = Canvas::default();
    let y = header(&mut canvas, report, chart);
    let y = match chart.axis {
        Some(axis) => curves::draw(&mut canvas, chart, axis, y),
        None => bars::draw(&mut canvas, chart, y),
    };
    let height = footer(&mut canvas, report, y);
    let hues: Vec<Color> = chart.contenders.iter().map(|name| Color::of(name)).collect();
    document(chart, &hues, height, &canvas)
}

/// Draws title and subtitle; returns where they end.
fn header(canvas: &mut Canvas, report: &Report, chart: &Chart) -> f64 {
    let mut y = 16.0;
    for line in wrap(chart.name, TITLE, RIGHT - LEFT) {
        y += 21.0;
        canvas.text(LEFT, y, "title", Anchor::Start, &line);
    }
    y += 20.0;
    arrow(canvas, LEFT + 5.0, y - 4.5, chart.better, chart.axis.is_some());
    let mut subtitle = chart.subtitle();
    let bases = chart.bases();
    if !bases.is_empty() {
        subtitle += &format!(" · × is the ratio to {bases}");
    }
    if !bases.is_empty() && chart.axis.is_none() {
        subtitle += ", the dotted line";
    }
    if report.is_quick {
        subtitle += " · QUICK RUN";
    }
    for (line_idx, line) in wrap(&subtitle, SUBTITLE, RIGHT - LEFT - 16.0).iter().enumerate() {
        y += if line_idx > 0 { 17.0 } else { 0.0 };
        canvas.text(LEFT + 16.0, y, "sub", Anchor::Start, line);
    }
    y + 12.0
}

/// An arrow to where better is: along the bars, or up and down a curve's axis.
fn arrow(canvas: &mut Canvas, x: f64, y: f64, better: Better, is_upright: bool) {
    let path = match (is_upright, better) {
        (false, Better::Higher) => "M-5 0H5M1 -4L5 0L1 4",
        (false, Better::Lower) => "M5 0H-5M-1 -4L-5 0L-1 4",
        (true, Better::Higher) => "M0 5V-5M-4 -1L0 -5L4 -1",
        (true, Better::Lower) => "M0 -5V5M-4 1L0 5L4 1",
    };
    canvas.path_at(x, y, "arrow", path);
}

/// Draws how and where it was measured; returns the picture's height.
fn footer(canvas: &mut Canvas, report: &Report, mut y: f64) -> f64 {
    y += 8.0;
    let how = match report.n_rounds {
        1 => "one round".to_owned(),
        n => format!("median of {n} interleaved rounds, whiskers from minimum to maximum"),
    };
    let how = if report.is_quick { format!("QUICK RUN, {how}") } else { how };
    let caption = format!("{} {}: {how}. {}", report.date, report.suite, report.machine.caption());
    for line in wrap(caption.trim_end(), CAPTION, RIGHT - LEFT) {
        y += 14.0;
        canvas.text(LEFT, y, "caption", Anchor::Start, &line);
    }
    y + 16.0
}

/// Sizes of text, in pixels.
const TITLE: f64 = 17.0;
const SUBTITLE: f64 = 12.5;
const CAPTION: f64 = 10.5;

/// The document around what was drawn.
fn document(chart: &Chart, hues: &[Color], height: f64, canvas: &Canvas) -> String {
    let rules = |dark: bool| {
        let hue = |(idx, hue): (usize, &Color)| {
            format!(".h{idx}{{--hue:{}}}", if dark { hue.dark } else { hue.light })
        };
        hues.iter().enumerate().map(hue).collect::<String>()
    };
    let conditions: Vec<String> = chart.figures.iter().map(|figure| figure.label()).collect();
    let description = format!(
        "{}. Contenders: {}. Conditions: {}.",
        chart.subtitle(),
        chart.contenders.join(", "),
        conditions.join("; ")
    );
    let (title, description) = (canvas::escape(chart.name), canvas::escape(&description));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-labelledby=\"title desc\">\n\
         <title id=\"title\">{title}</title>\n<desc id=\"desc\">{description}</desc>\n\
         <style>\n{LIGHT}{}\n@media (prefers-color-scheme: dark){{\n{DARK}{}\n}}\n{STYLE}</style>\n\
         <rect class=\"paper\" width=\"{WIDTH}\" height=\"{height:.0}\"/>\n{}</svg>\n",
        rules(false),
        rules(true),
        canvas.drawn(),
    )
}

const LIGHT: &str = "svg{--paper:#ffffff;--ink:#1f2328;--soft:#626a73;--faint:#e4e7eb}\n";
const DARK: &str = "svg{--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--faint:#2a313c}\n";
/// What the light and the dark one share. Text has a border of paper, so that lines stay out of it.
const STYLE: &str = "\
.paper{fill:var(--paper)}
text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif;\
font-variant-numeric:tabular-nums;fill:var(--ink);stroke:var(--paper);stroke-width:3px;\
stroke-linejoin:round;paint-order:stroke}
.title{font-size:17px;font-weight:600}
.sub{font-size:12.5px;fill:var(--soft)}
.condition{font-size:12px;font-weight:600}
.label{font-size:12px}
.strong{font-weight:700}
.soft{fill:var(--soft);font-weight:400}
.caption{font-size:10.5px;fill:var(--soft)}
.arrow{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-linecap:round;stroke-linejoin:round}
.grid{stroke:var(--faint);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.base{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.bar{fill:var(--hue)}
.whisker{fill:none;stroke:var(--ink);stroke-width:1.25;stroke-opacity:.8}
.line{fill:none;stroke:var(--hue);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.thick{stroke-width:3}
.spread{fill:none;stroke:var(--hue);stroke-width:1.25;stroke-opacity:.75}
.leader{fill:none;stroke:var(--hue);stroke-width:1;stroke-opacity:.6}
.marker{fill:var(--hue);stroke:var(--paper);stroke-width:1.5}
";

#[cfg(test)]
mod tests {
    use super::canvas::{LABEL, short, width};
    use super::*;
    use crate::tests::sample;

    /// That tags open and close in pairs, and that nothing stands in them that XML forbids.
    fn check_well_formed(svg: &str) {
        let mut open: Vec<&str> = vec![];
        let mut rest = svg;
        while let Some((text, after)) = rest.split_once('<') {
            assert!(!text.contains('>'), "{text}");
            for entity in text.split('&').skip(1) {
                let known = ["amp;", "lt;", "gt;", "quot;", "apos;"];
                assert!(known.iter().any(|known| entity.starts_with(known)), "{text}");
            }
            let (tag, after) = after.split_once('>').expect("a tag ends");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap());
            }
            rest = after;
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[derive(Debug)]
    struct TextBox {
        text: String,
        left: f64,
        right: f64,
        y: f64,
    }

    fn text_boxes(svg: &str) -> Vec<TextBox> {
        let texts = svg.split("<text ").skip(1).map(|rest| rest.split("</text>").next().unwrap());
        texts
            .map(|element| {
                let (tag, content) = element.split_once('>').unwrap();
                let attribute = |name: &str| {
                    let start = tag.find(&format!("{name}=\"")).unwrap() + name.len() + 2;
                    tag[start..].split('"').next().unwrap()
                };
                let mut text = String::new();
                for piece in content.split('<') {
                    text += piece.split_once('>').map_or(piece, |(_, after)| after);
                }
                let size = match attribute("class").split(' ').next().unwrap() {
                    "title" => TITLE,
                    "sub" => SUBTITLE,
                    "caption" => CAPTION,
                    _ => LABEL,
                };
                let (x, y) = (attribute("x").parse::<f64>().unwrap(), attribute("y"));
                let width = width(&text.replace("&amp;", "&"), size);
                let left = match attribute("text-anchor") {
                    "end" => x - width,
                    "middle" => x - width / 2.0,
                    _ => x,
                };
                TextBox { text, left, right: left + width, y: y.parse().unwrap() }
            })
            .collect()
    }

    fn check_no_overlap(svg: &str) {
        let boxes = text_boxes(svg);
        for (idx, this) in boxes.iter().enumerate() {
            assert!(this.left >= 0.0 && this.right <= WIDTH, "{this:?} is not in the picture");
            for that in &boxes[..idx] {
                let is_apart = this.left >= that.right
                    || that.left >= this.right
                    || (this.y - that.y).abs() >= 12.0;
                assert!(is_apart, "{} and {}: {this:?} and {that:?}", this.text, that.text);
            }
        }
    }

    #[test]
    fn pictures_are_well_formed_and_text_has_room() {
        for report in [sample::small(), sample::large(), sample::odd()] {
            for picture in pictures(&report) {
                check_well_formed(&picture.svg);
                check_no_overlap(&picture.svg);
            }
        }
    }

    #[test]
    fn a_picture_for_each_name_with_a_measured_row() {
        let stems: Vec<String> =
            pictures(&sample::odd()).into_iter().map(|picture| picture.stem).collect();
        assert_eq!(
            stems,
            [
                "2026-11-25-odd-a-b-c",
                "2026-11-25-odd-a-b-c-2",
                "2026-11-25-odd-some-failed",
                "2026-11-25-odd-alone",
                "2026-11-25-odd-endless",
                "2026-11-25-odd-below-zero",
                "2026-11-25-odd-wild",
                "2026-11-25-odd-curve-with-holes"
            ]
        );
    }

    #[test]
    fn what_xml_reads_as_markup_is_escaped() {
        let svg = &pictures(&sample::odd())[0].svg;
        assert!(
            svg.contains("<title id=\"title\">a &lt;b&gt; &amp; &quot;c&quot;</title>"),
            "{svg}"
        );
    }

    #[test]
    fn a_failed_row_says_so_and_a_nan_is_no_bar() {
        let svg = &pictures(&sample::odd())[2].svg;
        assert_eq!(svg.matches("no sample").count(), 2, "{svg}");
        assert_eq!(svg.matches("class=\"bar\"").count(), 1, "{svg}");
    }

    #[test]
    fn curves_where_points_are_bars_elsewhere() {
        let pictures = pictures(&sample::large());
        let kind = |picture: &Picture| {
            (picture.svg.contains("class=\"bar\""), picture.svg.contains("class=\"line"))
        };
        assert_eq!(
            pictures.iter().map(kind).collect::<Vec<_>>(),
            [(true, false), (true, false), (false, true), (false, true)]
        );
    }

    #[test]
    fn long_names_end_in_an_ellipsis() {
        assert_eq!(short("nohop", 60.0), "nohop");
        assert!(short("a contender of many words", 80.0).ends_with('…'));
    }
}
