//! Figures and their goals.

/// The means of every round, by case.
pub struct Figures {
    cases: Vec<(&'static str, Vec<f64>)>,
}

/// A case's goal, in ns.
pub enum Goal {
    /// At most this.
    AtMost(f64, &'static str),
    /// At most this more than another.
    Over(f64, &'static str, &'static str),
    /// At most this many times another.
    Times(f64, &'static str, &'static str),
}

impl Figures {
    pub fn of(names: impl Iterator<Item = &'static str>) -> Figures {
        Figures { cases: names.map(|name| (name, Vec::new())).collect() }
    }

    /// Adds a round: a mean for each case.
    ///
    /// # Panics
    /// When a case's program never ran.
    pub fn add(&mut self, round: impl Iterator<Item = f64>) {
        for ((name, means), mean) in self.cases.iter_mut().zip(round) {
            assert!(mean.is_finite(), "{name}: the program never ran");
            means.push(mean);
        }
    }

    pub fn print(&self, goals: &[Goal]) {
        println!("{:<28}{:>8}{:>8}{:>8}{:>8}", "", "median", "least", "most", "- empty");
        let empty = self.means("empty");
        for (name, means) in &self.cases {
            let [least, median, most] = spread(means.iter().copied());
            let [_, over, _] = spread(pairwise(means, empty, |mean, empty| mean - empty));
            println!("{name:<28}{median:>8.0}{least:>8.0}{most:>8.0}{over:>8.0}");
        }
        println!(
            "\nDifferences and ratios are medians of those in each round, with the least and the most."
        );
        for goal in goals {
            let ([least, is, most], limit, what) = self.meets(goal);
            // Not measured.
            if is.is_nan() {
                continue;
            }
            let verdict = if is <= limit { "reached" } else { "NOT reached" };
            let is = format!("{is:.2} ({least:.2} to {most:.2})");
            println!("{what:<58}{is:>26}  at most {limit:>5}: {verdict}");
        }
    }

    fn meets(&self, goal: &Goal) -> ([f64; 3], f64, String) {
        match *goal {
            Goal::AtMost(limit, name) => {
                (spread(self.means(name).iter().copied()), limit, format!("{name}, ns"))
            }
            Goal::Over(limit, name, other) => {
                let over = pairwise(self.means(name), self.means(other), |one, other| one - other);
                (spread(over), limit, format!("{name}, more than {other}, ns"))
            }
            Goal::Times(limit, name, other) => {
                let times = pairwise(self.means(name), self.means(other), |one, other| one / other);
                (spread(times), limit, format!("{name}, in times {other}"))
            }
        }
    }

    fn means(&self, wanted: &str) -> &[f64] {
        let found = self.cases.iter().find(|(name, _)| *name == wanted);
        found.map_or(&[], |(_, means)| means)
    }
}

fn pairwise<'a>(
    one: &'a [f64],
    other: &'a [f64],
    join: impl Fn(f64, f64) -> f64 + 'a,
) -> impl Iterator<Item = f64> + 'a {
    one.iter().zip(other).map(move |(&one, &other)| join(one, other))
}

/// The least, the median, the most.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => [f64::NAN; 3],
        n_values => [values[0], values[n_values / 2], values[n_values - 1]],
    }
}
