//! The screen of `nohop top`: what it shows is a function of the figures and of the keys so far.

use std::cmp::Ordering;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

use super::figures::{BackendFigures, Figures, ServiceFigures};
use crate::cli::format::no_backend;
use crate::counted::counted;
use crate::table::Watch;

/// A key, or several that mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyPress {
    /// A character.
    Char(char),
    /// Deletes the last character.
    Backspace,
    /// Enter.
    Enter,
    /// Escape.
    Escape,
    /// By so many rows down, or up.
    Move(isize),
    /// Ends the command, also where a letter would be text.
    Quit,
}

/// What follows from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The screen is drawn again.
    Draw,
    /// The command ends.
    Quit,
}

/// The state of the screen: what the keys so far have chosen.
#[derive(Clone, Debug, Default)]
pub struct Screen {
    has_colour: bool,
    sort: Sort,
    is_reversed: bool,
    filter: String,
    is_typing: bool,
    /// The name of the service that is marked; the first row is where it is none of the list.
    selected: String,
    /// Whether the page of that service is shown.
    is_page: bool,
    /// The row that is marked there.
    backend_idx: usize,
}

/// What the services are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sort {
    #[default]
    Connects,
    InFlight,
    Refused,
    Failed,
    ConnectTime,
    Name,
}

/// What is known of the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The last figures; `None` before the first.
    pub figures: Option<&'a Figures>,
    /// Why there are no newer ones, and how old these are.
    pub lost: Option<(&'a str, Duration)>,
}

impl Sort {
    const ALL: [(char, Sort); 6] = [
        ('c', Sort::Connects),
        ('i', Sort::InFlight),
        ('r', Sort::Refused),
        ('f', Sort::Failed),
        ('t', Sort::ConnectTime),
        ('n', Sort::Name),
    ];

    /// The greatest number first, where it is known, or names in their order.
    fn compare(self, one: &ServiceFigures, other: &ServiceFigures) -> Ordering {
        let number = |service: &ServiceFigures| match self {
            Sort::Connects => service.connects_per_second,
            Sort::InFlight => service.in_flight.map(|n| n as f64),
            Sort::Refused => service.refused_per_second,
            Sort::Failed => service.failed_per_second,
            Sort::ConnectTime => service.connect_us,
            Sort::Name => None,
        };
        let number = |service| number(service).unwrap_or(-1.0);
        number(other).total_cmp(&number(one)).then_with(|| one.name.cmp(&other.name))
    }
}

impl Screen {
    /// A screen before the first key, with colours or without.
    pub fn new(has_colour: bool) -> Screen {
        Screen { has_colour, ..Screen::default() }
    }

    /// Applies a key.
    pub fn press(&mut self, key: KeyPress, figures: Option<&Figures>) -> Next {
        if self.is_typing {
            match key {
                KeyPress::Char(character) => self.filter.push(character),
                KeyPress::Backspace => drop(self.filter.pop()),
                KeyPress::Enter => self.is_typing = false,
                KeyPress::Escape => {
                    self.is_typing = false;
                    self.filter.clear();
                }
                KeyPress::Move(rows) => self.go(rows, figures),
                KeyPress::Quit => return Next::Quit,
            }
            return Next::Draw;
        }
        match key {
            KeyPress::Char('q') | KeyPress::Quit => return Next::Quit,
            KeyPress::Char('/') if !self.is_page => self.is_typing = true,
            KeyPress::Enter => self.open(figures),
            KeyPress::Escape | KeyPress::Backspace if self.is_page => self.is_page = false,
            KeyPress::Escape => self.filter.clear(),
            KeyPress::Char('j') => self.go(1, figures),
            KeyPress::Char('k') => self.go(-1, figures),
            KeyPress::Move(rows) => self.go(rows, figures),
            KeyPress::Char(character) => {
                let chosen = Sort::ALL.iter().find(|(letter, _)| *letter == character);
                if let Some(&(_, sort)) = chosen {
                    self.is_reversed = self.sort == sort && !self.is_reversed;
                    self.sort = sort;
                }
            }
            KeyPress::Backspace => {}
        }
        Next::Draw
    }

    fn go(&mut self, rows: isize, figures: Option<&Figures>) {
        let Some(figures) = figures else { return };
        if self.is_page {
            let n = self.page(figures).map_or(0, |service| service.backends.len());
            self.backend_idx = moved(self.backend_idx, rows, n);
            return;
        }
        let shown = self.shown(figures);
        let selected = moved(self.selected_idx(&shown), rows, shown.len());
        if let Some(service) = shown.get(selected) {
            self.selected.clone_from(&service.name);
        }
    }

    fn open(&mut self, figures: Option<&Figures>) {
        let shown = figures.map(|figures| self.shown(figures)).unwrap_or_default();
        if let Some(service) = shown.get(self.selected_idx(&shown)) {
            self.selected.clone_from(&service.name);
            self.is_page = true;
            self.backend_idx = 0;
        }
    }

    /// The services that the filter lets through, in the order of the screen.
    fn shown<'a>(&self, figures: &'a Figures) -> Vec<&'a ServiceFigures> {
        let filter = self.filter.to_lowercase();
        let services = figures.services.iter();
        let mut shown: Vec<_> = services.filter(|service| service.name.contains(&filter)).collect();
        shown.sort_by(|one, other| match self.is_reversed {
            true => self.sort.compare(other, one),
            false => self.sort.compare(one, other),
        });
        shown
    }

    fn selected_idx(&self, shown: &[&ServiceFigures]) -> usize {
        shown.iter().position(|service| service.name == self.selected).unwrap_or_default()
    }

    fn page<'a>(&self, figures: &'a Figures) -> Option<&'a ServiceFigures> {
        figures.services.iter().find(|service| service.name == self.selected)
    }

    /// Draws the screen.
    pub fn draw(&self, frame: &mut Frame<'_>, known: Known<'_>) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(3), Constraint::Fill(1), Constraint::Length(1)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head(known)), head);
        match known.figures {
            Some(figures) if self.is_page => self.draw_page(frame, body, figures),
            Some(figures) => self.draw_services(frame, body, figures),
            None => {}
        }
        frame.render_widget(Line::styled(self.foot(), Modifier::DIM), foot);
    }

    fn colour(&self, colour: Color) -> Style {
        if self.has_colour { Style::new().fg(colour) } else { Style::new() }
    }

    fn good(&self) -> Style {
        self.colour(Color::Green)
    }

    fn bad(&self) -> Style {
        self.colour(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn head(&self, known: Known<'_>) -> Vec<Line<'static>> {
        let lost = known.lost.map(|(error, age)| {
            let age = known.figures.map(|_| format!("as of {} s ago, ", age.as_secs()));
            let text = format!("NO ANSWER  {}connecting again: {error}", age.unwrap_or_default());
            Line::styled(text, self.bad())
        });
        let Some(figures) = known.figures else {
            let text = if lost.is_some() { "nohop top" } else { "nohop top  connecting" };
            return std::iter::once(Line::raw(text)).chain(lost).collect();
        };
        let ready = match figures.ready {
            true => Span::styled("ready", self.good()),
            false => Span::styled("NOT READY", self.bad()),
        };
        let generation = figures.generation;
        let mut first = vec![
            Span::styled(format!("nohop {}", figures.version), Modifier::BOLD),
            Span::raw("  "),
            ready,
            Span::raw(format!("  generation {generation}")),
        ];
        for source in &figures.sources {
            let age = source.age_seconds.map(|seconds| format!(" {seconds:.0} s ago"));
            let text = format!("  {} {}{}", source.name, source.state, age.unwrap_or_default());
            let is_failing = source.state == "failing";
            first.push(Span::styled(text, if is_failing { self.bad() } else { Style::new() }));
        }
        let problem = figures.problems.first().map(|problem| {
            let more = match figures.problems.len() {
                1 => String::new(),
                n => format!("{n} problems, see nohop status: "),
            };
            Line::styled(format!("! {more}{problem}"), self.bad())
        });
        let total = |number: fn(&ServiceFigures) -> Option<f64>| {
            let numbers = figures.services.iter().filter_map(number);
            rate(numbers.reduce(|sum, number| sum + number))
        };
        let retransmits =
            figures.services.iter().filter_map(|it| it.syn_retransmits_per_second).sum();
        let totals = format!(
            "{}  {} connects/s  {} in flight  {} refused/s  {} failed/s{}",
            counted(figures.services.len(), "service"),
            total(|service| service.connects_per_second),
            count(
                figures
                    .services
                    .iter()
                    .filter_map(|service| service.in_flight)
                    .reduce(|a, b| a + b)
            ),
            total(|service| service.refused_per_second),
            total(|service| service.failed_per_second),
            syn_retransmits(retransmits),
        );
        vec![Line::from(first), Line::raw(totals), lost.or(problem).unwrap_or_default()]
    }

    fn foot(&self) -> String {
        if self.is_typing {
            return format!("filter: {}_  Enter keep  Esc clear", self.filter);
        }
        if self.is_page {
            return "Esc back  ↑↓ select  q quit".to_owned();
        }
        let filter = match self.filter.is_empty() {
            true => "/ filter".to_owned(),
            false => format!("filter: {}  Esc clear", self.filter),
        };
        format!("{filter}  Enter backends  sort: c i r f t n, again reverses  q quit")
    }

    fn draw_services(&self, frame: &mut Frame<'_>, area: Rect, figures: &Figures) {
        let shown = self.shown(figures);
        let columns = [
            ("SERVICE", Constraint::Fill(1), Some(Sort::Name)),
            ("BACKENDS", Constraint::Length(9), None),
            ("CONN/S", Constraint::Length(8), Some(Sort::Connects)),
            ("IN-FLIGHT", Constraint::Length(10), Some(Sort::InFlight)),
            ("REFUSED/S", Constraint::Length(10), Some(Sort::Refused)),
            ("FAILED/S", Constraint::Length(9), Some(Sort::Failed)),
            ("CONNECT", Constraint::Length(8), Some(Sort::ConnectTime)),
        ];
        let head = columns.iter().enumerate().map(|(column, &(title, _, sort))| {
            let is_chosen = sort == Some(self.sort);
            let mark = if is_chosen && self.is_reversed { "^" } else { "v" };
            let title = if is_chosen { format!("{title}{mark}") } else { title.to_owned() };
            aligned(column, title)
        });
        let rows = shown.iter().map(|service| {
            let cells = [
                service.name.clone(),
                format!("{}/{}", service.reached, service.backends.len()),
                rate(service.connects_per_second),
                count(service.in_flight),
                rate(service.refused_per_second),
                rate(service.failed_per_second),
                time(service.connect_us),
            ];
            let row = Row::new(cells.into_iter().enumerate().map(|(at, text)| aligned(at, text)));
            let is_failing = |rate: Option<f64>| rate.is_some_and(|rate| rate > 0.0);
            let is_down = service.reached == 0 && service.watch == Watch::Live;
            let is_bad = is_down
                || service.error.is_some()
                || is_failing(service.refused_per_second)
                || is_failing(service.failed_per_second);
            row.style(if is_bad { self.bad() } else { Style::new() })
        });
        let widths = columns.map(|(_, width, _)| width);
        let selected = self.selected_idx(&shown);
        table(frame, area, head.collect(), rows.collect(), &widths, selected);
    }

    fn draw_page(&self, frame: &mut Frame<'_>, area: Rect, figures: &Figures) {
        let Some(service) = self.page(figures) else {
            let text = format!("{} is gone", self.selected);
            frame.render_widget(Line::styled(text, self.bad()), area);
            return;
        };
        let [about, backends, detail] =
            Layout::vertical([Constraint::Length(1), Constraint::Fill(1), Constraint::Length(1)])
                .areas(area);
        let ServiceFigures { name, vip, ports, algorithm, .. } = service;
        let retransmits = syn_retransmits(service.syn_retransmits_per_second.unwrap_or_default());
        let rates = format!("{} connects/s{retransmits}", rate(service.connects_per_second));
        let text = format!("{name}  {vip}:{ports}  {algorithm}  {rates}");
        let text = match (&service.error, service.backends.is_empty()) {
            (Some(error), _) => format!("{text}  ! {error}"),
            (None, true) => format!("{text}  {}", no_backend(service.watch)),
            (None, false) => text,
        };
        frame.render_widget(Line::styled(text, Modifier::BOLD), about);

        let columns = [
            ("BACKEND", Constraint::Fill(1)),
            ("STATE", Constraint::Length(10)),
            ("WEIGHT", Constraint::Length(6)),
            ("FLIGHT", Constraint::Length(6)),
            ("CONN/S", Constraint::Length(7)),
            ("FAIL/S", Constraint::Length(7)),
            ("CONNECT", Constraint::Length(7)),
            ("RTT", Constraint::Length(7)),
        ];
        let head = columns.iter().enumerate();
        let head = head.map(|(column, (title, _))| aligned(column, (*title).to_owned()));
        let rows = service.backends.iter().map(|backend| {
            let cells = [
                backend.address.clone(),
                format!("{:?}", backend.state).to_lowercase(),
                backend.weight.to_string(),
                count(backend.in_flight),
                rate(backend.connects_per_second),
                rate(backend.failures_per_second),
                time(backend.connect_us.map(f64::from)),
                time(backend.rtt_us.map(f64::from)),
            ];
            let row = Row::new(cells.into_iter().enumerate().map(|(at, text)| aligned(at, text)));
            let is_failing = backend.failures_per_second.is_some_and(|rate| rate > 0.0);
            let is_bad = is_failing || !backend.state.is_reached();
            row.style(if is_bad { self.bad() } else { Style::new() })
        });
        let widths = columns.map(|(_, width)| width);
        let selected = self.backend_idx.min(service.backends.len().saturating_sub(1));
        table(frame, backends, head.collect(), rows.collect(), &widths, selected);
        if let Some(backend) = service.backends.get(selected) {
            frame.render_widget(Line::raw(place(backend)), detail);
        }
    }
}

/// Where a backend runs, and why it is in this state.
fn place(backend: &BackendFigures) -> String {
    let name = &backend.instance_name;
    let node = match backend.node.as_str() {
        "" => name.clone(),
        node => format!("{node}/{name}"),
    };
    match &backend.reason {
        Some(reason) => format!("{node}: {reason}"),
        None => node,
    }
}

fn moved(from: usize, rows: isize, n: usize) -> usize {
    from.saturating_add_signed(rows).min(n.saturating_sub(1))
}

/// A cell: the first column's text begins at the left, numbers end at the right.
fn aligned(column: usize, text: String) -> Cell<'static> {
    let line = Line::from(text);
    Cell::from(if column == 0 { line } else { line.right_aligned() })
}

fn table(
    frame: &mut Frame<'_>,
    area: Rect,
    head: Vec<Cell<'static>>,
    rows: Vec<Row<'static>>,
    widths: &[Constraint],
    selected: usize,
) {
    let mut state = TableState::new().with_selected(selected);
    let table = Table::new(rows, widths)
        .header(Row::new(head).style(Modifier::BOLD))
        .row_highlight_style(Modifier::REVERSED);
    frame.render_stateful_widget(table, area, &mut state);
}

fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate == 0.0 || rate >= 100.0 => format!("{rate:.0}"),
        Some(rate) => format!("{rate:.1}"),
    }
}

/// Retransmitted SYNs a second, where there are any.
fn syn_retransmits(per_second: f64) -> String {
    match per_second {
        0.0 => String::new(),
        _ => format!("  {} SYN retransmits/s", rate(Some(per_second))),
    }
}

fn count(n: Option<u64>) -> String {
    n.map_or_else(|| "-".to_owned(), |n| n.to_string())
}

/// A time in microseconds, in at most seven characters.
fn time(us: Option<f64>) -> String {
    match us {
        None => "-".to_owned(),
        Some(us) if us < 1_000.0 => format!("{us:.0}us"),
        Some(us) if us < 100_000.0 => format!("{:.1}ms", us / 1e3),
        Some(us) if us < 1_000_000.0 => format!("{:.0}ms", us / 1e3),
        Some(us) => format!("{:.1}s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::figures::tests::{sample, service};
    use super::*;

    fn figures() -> Figures {
        let first = Instant::now();
        let before = sample(
            first,
            0,
            vec![
                service("api", 0, &[("10.0.0.9:1", 0, 0)]),
                service("db", 10, &[]),
                service("web", 100, &[("10.0.0.1:8080", 60, 0), ("10.0.0.2:8080", 40, 0)]),
            ],
        );
        let mut now = sample(
            first,
            1_000,
            vec![
                service("api", 300, &[("10.0.0.9:1", 300, 0)]),
                service("db", 10, &[]),
                service("web", 120, &[("10.0.0.1:8080", 71, 2), ("10.0.0.2:8080", 49, 0)]),
            ],
        );
        now.services[2].backends[0].rtt_us = Some(123_456);
        now.services[2].syn_retransmits = 4;
        Figures::new(Some(&before), &now)
    }

    fn lines(screen: &Screen, known: Known<'_>, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame, known)).unwrap();
        let buffer = terminal.backend().buffer();
        let text = buffer.content.iter().map(|cell| cell.symbol()).collect::<String>();
        let symbols: Vec<char> = text.chars().collect();
        let rows = symbols.chunks(width.into());
        rows.map(|row| row.iter().collect::<String>().trim_end().to_owned()).collect()
    }

    fn shown(screen: &Screen, figures: &Figures) -> Vec<String> {
        lines(screen, Known { figures: Some(figures), lost: None }, 80, 24)
    }

    #[test]
    fn services_are_a_row_each_with_most_connections_first() {
        let shown = shown(&Screen::default(), &figures());
        let expected = [
            "nohop 0.1.0  ready  generation 12  consul live 0 s ago",
            "3 services  320 connects/s  9 in flight  0 refused/s  2.0 failed/s  4.0 SYN retr",
            "",
            "SERVICE               BACKENDS  CONN/Sv  IN-FLIGHT  REFUSED/S  FAILED/S  CONNECT",
            "api                        1/1      300          3          0         0    300us",
            "web                        2/2     20.0          6          0       2.0     61us",
            "db                         0/0        0          0          0         0        -",
            "",
        ];
        assert_eq!(shown[..8], expected, "{shown:#?}");
        assert_eq!(
            shown[23],
            "/ filter  Enter backends  sort: c i r f t n, again reverses  q quit"
        );
    }

    #[test]
    fn keys_sort_filter_and_open_a_page() {
        let figures = figures();
        let mut screen = Screen::default();
        let press = |screen: &mut Screen, keys: &[KeyPress]| {
            for key in keys {
                assert_eq!(screen.press(*key, Some(&figures)), Next::Draw);
            }
            shown(screen, &figures)
        };
        let names = |shown: &[String]| -> Vec<String> {
            let rows = shown[4..7].iter().filter(|row| !row.is_empty());
            rows.map(|row| row.split(' ').next().unwrap_or_default().to_owned()).collect()
        };
        let shown = press(&mut screen, &[KeyPress::Char('n')]);
        assert_eq!(names(&shown), ["api", "db", "web"]);
        assert!(shown[3].starts_with("SERVICEv "), "{shown:#?}");
        assert_eq!(names(&press(&mut screen, &[KeyPress::Char('n')])), ["web", "db", "api"]);
        assert_eq!(names(&press(&mut screen, &[KeyPress::Char('f')])), ["web", "api", "db"]);
        let shown = press(&mut screen, &[KeyPress::Char('/'), KeyPress::Char('B')]);
        assert_eq!(names(&shown), ["web", "db"]);
        assert!(shown[23].starts_with("filter: B_"), "{shown:#?}");
        // While a filter is typed, q is a letter of it.
        let shown =
            press(&mut screen, &[KeyPress::Char('q'), KeyPress::Backspace, KeyPress::Enter]);
        assert!(shown[23].starts_with("filter: B  Esc clear"), "{shown:#?}");
        // The page of the marked service, which isn't the first, whatever the order becomes.
        let shown = press(
            &mut screen,
            &[KeyPress::Escape, KeyPress::Char('c'), KeyPress::Move(1), KeyPress::Enter],
        );
        let expected = [
            "web  127.186.3.9:80  random  20.0 connects/s  4.0 SYN retransmits/s",
            "BACKEND                STATE WEIGHT FLIGHT  CONN/S  FAIL/S CONNECT     RTT",
            "10.0.0.1:8080        healthy      1      3    11.0     2.0    71us   123ms",
            "10.0.0.2:8080        healthy      1      3     9.0       0    49us       -",
        ];
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let found: Vec<_> = shown[3..7].iter().map(|line| words(line)).collect();
        assert_eq!(found, expected.map(words), "{shown:#?}");
        assert_eq!(shown[22], "n1/web-10.0.0.1:8080");
        let shown = press(&mut screen, &[KeyPress::Char('j')]);
        assert_eq!(shown[22], "n1/web-10.0.0.2:8080");
        let shown = press(&mut screen, &[KeyPress::Escape]);
        assert_eq!(names(&shown), ["api", "web", "db"]);
        assert_eq!(screen.press(KeyPress::Char('q'), Some(&figures)), Next::Quit);
    }

    #[test]
    fn a_lost_daemon_is_shown_with_the_age_of_the_figures() {
        let figures = figures();
        let lost = Some(("no daemon answers", Duration::from_secs(7)));
        let screen = Screen::default();
        let shown = lines(&screen, Known { figures: Some(&figures), lost }, 80, 24);
        assert_eq!(shown[2], "NO ANSWER  as of 7 s ago, connecting again: no daemon answers");
        assert!(shown[4].starts_with("api "), "{shown:#?}");
        let shown = lines(&screen, Known { figures: None, lost }, 80, 24);
        assert_eq!(shown[1], "NO ANSWER  connecting again: no daemon answers");
        let shown = lines(&screen, Known { figures: None, lost: None }, 80, 24);
        assert_eq!(shown[0], "nohop top  connecting");
    }

    #[test]
    fn any_size_is_drawn_and_numbers_stay_whole() {
        let figures = figures();
        let known = Known { figures: Some(&figures), lost: None };
        let mut screen = Screen::default();
        for _ in 0..2 {
            for (width, height) in [(1, 1), (10, 3), (20, 5), (60, 10), (300, 100)] {
                lines(&screen, known, width, height);
            }
            screen.press(KeyPress::Enter, Some(&figures));
        }
        let mut many = figures.clone();
        many.services = (0..100)
            .map(|n| ServiceFigures { name: format!("s{n:02}"), ..figures.services[1].clone() })
            .collect();
        let mut screen = Screen::default();
        screen.press(KeyPress::Move(99), Some(&many));
        // The marked row is on the screen.
        let shown = shown(&screen, &many);
        assert!(shown[22].starts_with("s99 "), "{shown:#?}");
    }

    #[test]
    fn colours_are_left_out_on_demand() {
        let mut figures = figures();
        figures.ready = false;
        let colours = |has_colour| {
            let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
            let screen = Screen::new(has_colour);
            let known = Known { figures: Some(&figures), lost: None };
            terminal.draw(|frame| screen.draw(frame, known)).unwrap();
            let cells = terminal.backend().buffer().content.iter();
            cells.filter(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset).count()
        };
        assert!(colours(true) > 0);
        assert_eq!(colours(false), 0);
    }

    #[test]
    fn times_have_seven_characters_at_most() {
        for (us, expected) in [
            (0.4, "0us"),
            (999.0, "999us"),
            (1_500.0, "1.5ms"),
            (99_900.0, "99.9ms"),
            (250_000.0, "250ms"),
            (4_294_967_295.0, "4295.0s"),
        ] {
            assert_eq!(time(Some(us)), expected);
        }
        assert_eq!(time(None), "-");
    }
}
