//! The algorithms by which a backend is selected among those that are eligible, as plain functions:
//! how a connection's position in turn is found, how two backends compare, how a new backend ramps
//! up. [`choose`](crate::choose) puts them together.
//!
//! Weights are honoured twice where they have to be: slots are drawn by weight, and open connections
//! are compared per weight. Divisions are avoided by multiplying both sides.

/// How a service's backend is selected, the number in [`ServiceFlags`](crate::ServiceFlags).
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// At random, by weight.
    #[default]
    Random = 0,
    /// In turn, by weight.
    RoundRobin = 1,
    /// Of two random ones, the one with fewer open connections from this node for its weight.
    Least = 2,
    /// Of two random ones, the one whose round-trip or connect time, times its open connections from
    /// this node for its weight, is less.
    Latency = 3,
    /// By a consistent hash of a key, so that connections of one key go to one backend.
    Maglev = 4,
}

impl Algorithm {
    /// All of them, by number.
    pub const ALL: [Algorithm; 5] = [
        Algorithm::Random,
        Algorithm::RoundRobin,
        Algorithm::Least,
        Algorithm::Latency,
        Algorithm::Maglev,
    ];

    /// The algorithm with this number. One that this version doesn't know is taken as random, as
    /// nothing else is right for every service.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Algorithm {
        match number {
            1 => Algorithm::RoundRobin,
            2 => Algorithm::Least,
            3 => Algorithm::Latency,
            4 => Algorithm::Maglev,
            _ => Algorithm::Random,
        }
    }

    /// Its name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::Random => "random",
            Algorithm::RoundRobin => "round-robin",
            Algorithm::Least => "least",
            Algorithm::Latency => "latency",
            Algorithm::Maglev => "maglev",
        }
    }
}

/// What two backends are compared by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Open connections from this node; below 0 is taken as 0.
    pub in_flight: i32,
    /// The weight, 1..=65,535, times its ramp of [`RAMP_ONE`].
    pub weight: u32,
    /// What a connection costs: the larger of its connect time and its round-trip time, in
    /// microseconds; 0 where neither is known.
    pub cost_us: u32,
}

/// The whole of a ramp.
pub const RAMP_ONE: u32 = 1 << RAMP_BITS;
const RAMP_BITS: u32 = 10;

/// In-flight counts above that are equal. It bounds products below 64 bits.
const MAX_IN_FLIGHT: i32 = (1 << 20) - 1;
/// Costs above that, 4.2 s, are equal.
const MAX_COST_US: u32 = (1 << 22) - 1;
/// Added to each cost. Within a datacenter times differ by how busy the hosts were just then, several times over
/// and by less than this, and say nothing of how long a backend works on a request: there open connections decide.
const NEAR_US: u32 = 1_000;

impl Load {
    #[inline(always)]
    fn in_flight(self) -> u64 {
        self.in_flight.clamp(0, MAX_IN_FLIGHT) as u64
    }

    /// Whether this backend has fewer open connections for its weight than the other.
    ///
    /// Nothing is added to the counts: two idle backends are equal, so the one that was drawn first
    /// is taken, and weights alone decide.
    #[inline(always)]
    pub fn is_less(self, other: Load) -> bool {
        // Below 2^20 * 2^26.
        self.in_flight() * u64::from(other.weight) < other.in_flight() * u64::from(self.weight)
    }

    /// Whether this backend's cost times its open connections for its weight, the new one included,
    /// is less than the other's.
    ///
    /// The new one weighs as much with both: `cost * (in_flight / weight + 1 / max(weights))`, so that
    /// weights alone decide between idle backends of the same cost. Where a cost isn't known both are
    /// taken as equal: a backend without history is neither best nor worst.
    #[inline(always)]
    pub fn is_quicker(self, other: Load) -> bool {
        if self.cost_us == 0 || other.cost_us == 0 {
            return self.is_less(other);
        }
        let larger = if self.weight > other.weight { self.weight } else { other.weight };
        let shift = shift_to_ten_bits(larger);
        let (own, others) = ((self.weight >> shift).max(1), (other.weight >> shift).max(1));
        let larger = u64::from(larger >> shift);
        let product = u64::from(own) * u64::from(others);
        // Below (2^22 + 2^10) * (2^20 * 2^10 * 2^10 + 2^20).
        let score = |load: Load, weight: u32| {
            let cost = u64::from(load.cost_us.min(MAX_COST_US) + NEAR_US);
            cost * (load.in_flight() * u64::from(weight) * larger + product)
        };
        score(self, others) < score(other, own)
    }
}

/// By how many bits weights are shifted so that the larger of two, below 2^26, has ten at most, and
/// six at least if it had them.
#[inline(always)]
fn shift_to_ten_bits(larger: u32) -> u32 {
    match larger {
        0..0x400 => 0,
        0x400..0x4000 => 4,
        0x4000..0x4_0000 => 8,
        0x4_0000..0x40_0000 => 12,
        _ => 16,
    }
}

/// The slot whose turn it is, and the coin that decides between its own backend and its alias: the
/// connection that `n_before` others came before.
///
/// Each slot has its turn once in `n_slots` connections. The coin is the same throughout such a round
/// and goes through a low-discrepancy sequence from round to round (multiples of the golden ratio,
/// Weyl 1916), so a slot's sides have their shares after few rounds. `None` without slots.
#[inline(always)]
pub fn turn(n_before: u64, n_slots: u32) -> Option<(u32, u16)> {
    let n_slots = u64::from(n_slots);
    let round = n_before.checked_div(n_slots)?;
    let slot = n_before.wrapping_sub(round.wrapping_mul(n_slots));
    Some((slot as u32, (round as u16).wrapping_mul(0x9E37)))
}

/// The time in which a new backend comes to its full share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlowStart {
    /// How much of the ramp passes in 2^20 ns, in 1/2^20 of [`RAMP_ONE`]; 0 for no ramp. It is a
    /// reciprocal, so that the kernel multiplies.
    pub per_tick: u32,
}

const TICK_BITS: u32 = 20;
/// A ramp begins with a tenth, as Envoy's does.
const RAMP_FIRST: u32 = RAMP_ONE / 10;

impl SlowStart {
    /// The ramp that takes so many nanoseconds; none for less than 2^20.
    pub const fn of(ns: u64) -> SlowStart {
        match (1u64 << (RAMP_BITS + TICK_BITS)).checked_div(ns >> TICK_BITS) {
            None => SlowStart { per_tick: 0 },
            // Rounded up, so that it ends in time: an hour's is right to within 0.4%.
            Some(per_tick) => SlowStart { per_tick: per_tick as u32 + 1 },
        }
    }

    /// How much of its weight a backend of this age has, in 1/[`RAMP_ONE`]: a tenth at first, then in
    /// proportion to the age, at last all.
    #[inline(always)]
    pub const fn ramp(self, age_ns: u64) -> u32 {
        let ticks = age_ns >> TICK_BITS;
        // After 2^30 ticks, 13 days, the slowest ramp is over, and the product is below 2^62.
        if self.per_tick == 0 || ticks >> (RAMP_BITS + TICK_BITS) != 0 {
            return RAMP_ONE;
        }
        let ramp = (ticks * self.per_tick as u64) >> TICK_BITS;
        if ramp >= RAMP_ONE as u64 {
            RAMP_ONE
        } else if ramp <= RAMP_FIRST as u64 {
            RAMP_FIRST
        } else {
            ramp as u32
        }
    }
}

/// The moving average of a time after one more sample, in microseconds; at least 1, because 0 is no
/// sample.
///
/// It is sensitive to peaks, as Finagle's "peak EWMA" is: a longer time takes effect at once, and is
/// forgotten by an eighth of the difference with each shorter one.
#[inline(always)]
pub const fn peak_average_us(average_us: u32, sample_us: u32) -> u32 {
    if sample_us >= average_us {
        return if sample_us == 0 { 1 } else { sample_us };
    }
    // Rounded up, so that it arrives.
    let step = (average_us - sample_us).div_ceil(8);
    let average = average_us - step;
    if average == 0 { 1 } else { average }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(in_flight: i32, weight: u32, cost_us: u32) -> Load {
        Load { in_flight, weight, cost_us }
    }

    #[test]
    fn numbers_and_names() {
        for (number, algorithm) in (0..).zip(Algorithm::ALL) {
            assert_eq!(algorithm as u32, number);
            assert_eq!(Algorithm::from_number(number), algorithm);
        }
        assert_eq!(Algorithm::from_number(5), Algorithm::Random);
        let names = Algorithm::ALL.map(Algorithm::name);
        assert_eq!(names, ["random", "round-robin", "least", "latency", "maglev"]);
    }

    #[test]
    fn open_connections_are_compared_for_their_weight() {
        // One and other as (in-flight, weight), and which of them has less.
        let rows = [
            ((0, 1), (0, 9), "neither"),
            ((0, 1), (1, 9), "one"),
            ((1, 1), (3, 3), "neither"),
            ((1, 1), (2, 3), "other"),
            ((-5, 1), (0, 1), "neither"),
            ((-5, 1), (1, 1), "one"),
            ((i32::MAX, 1), (i32::MAX, 65_535 << 10), "other"),
            ((i32::MIN, 1), (i32::MAX, 1), "one"),
        ];
        for ((in_flight, weight), (in_flight2, weight2), expected) in rows {
            let (one, other) = (load(in_flight, weight, 0), load(in_flight2, weight2, 0));
            let less = match (one.is_less(other), other.is_less(one)) {
                (true, false) => "one",
                (false, true) => "other",
                (false, false) => "neither",
                (true, true) => "both",
            };
            assert_eq!(less, expected, "{one:?} {other:?}");
        }
    }

    #[test]
    fn costs_multiply_open_connections() {
        let rows = [
            // The same cost: by open connections for their weight.
            (load(0, 1, 500), load(0, 9, 500), "neither"),
            (load(1, 1, 500), load(3, 3, 500), "neither"),
            (load(1, 1, 500), load(2, 3, 500), "other"),
            // Idle: by cost.
            (load(0, 1, 400), load(0, 9, 500), "one"),
            // With the millisecond, one of 5 ms is as good as one of 1 ms with two open connections.
            (load(0, 2, 5_000), load(2, 2, 1_000), "neither"),
            (load(0, 2, 5_000), load(3, 2, 1_000), "one"),
            // Below it an open connection outweighs what differs.
            (load(1, 1, 30), load(0, 1, 300), "other"),
            (load(0, 1, 30), load(0, 1, 300), "one"),
            // Without history: by open connections.
            (load(0, 1, 0), load(0, 1, 500), "neither"),
            (load(1, 1, 0), load(0, 1, 500), "other"),
            // The bounds.
            (load(i32::MAX, 65_535 << 10, u32::MAX), load(0, 65_535 << 10, u32::MAX), "other"),
            (load(i32::MAX, 1, u32::MAX), load(i32::MAX, 65_535 << 10, u32::MAX), "other"),
        ];
        for (one, other, expected) in rows {
            let quicker = match (one.is_quicker(other), other.is_quicker(one)) {
                (true, false) => "one",
                (false, true) => "other",
                (false, false) => "neither",
                (true, true) => "both",
            };
            assert_eq!(quicker, expected, "{one:?} {other:?}");
        }
    }

    proptest! {
        #[test]
        fn of_two_backends_one_at_most_is_better(
            loads in prop::array::uniform2((any::<i32>(), 1u32..1 << 26, any::<u32>())),
        ) {
            let [one, other] = loads.map(|(in_flight, weight, cost)| load(in_flight, weight, cost));
            prop_assert!(!(one.is_less(other) && other.is_less(one)));
            prop_assert!(!(one.is_quicker(other) && other.is_quicker(one)));
            prop_assert!(!one.is_less(one) && !one.is_quicker(one));
        }

        #[test]
        fn a_ramp_rises_and_ends_in_time(
            ns in 1u64 << 20..3_600_000_000_000,
            ages in prop::array::uniform2(any::<u64>()),
        ) {
            let start = SlowStart::of(ns);
            let [younger, older] = if ages[0] < ages[1] { ages } else { [ages[1], ages[0]] };
            prop_assert!(start.ramp(younger) <= start.ramp(older));
            prop_assert!((RAMP_FIRST..=RAMP_ONE).contains(&start.ramp(younger)));
            prop_assert_eq!(start.ramp(ns), RAMP_ONE);
            // To within the tick, and the reciprocal's 0.4%.
            let half = start.ramp(ns / 2);
            let tick = (1u64 << 30) / ns + 1;
            prop_assert!(u64::from(half.abs_diff(RAMP_ONE / 2)) <= 2 * tick + 3, "{half}");
        }
    }

    #[test]
    fn a_ramp_is_a_tenth_then_the_age_then_all() {
        const S: u64 = 1_000_000_000;
        let start = SlowStart::of(10 * S);
        let rows = [(0, 102), (S / 2, 102), (S, 102), (2 * S, 204), (5 * S, 511), (9 * S, 921)];
        for (age, expected) in rows {
            assert!(start.ramp(age).abs_diff(expected) <= 1, "{} for {age} ns", start.ramp(age));
        }
        assert_eq!(start.ramp(u64::MAX), RAMP_ONE);
        assert_eq!(SlowStart::of(0).ramp(0), RAMP_ONE);
        assert_eq!(SlowStart::of(u64::MAX), SlowStart { per_tick: 1 });
    }

    #[test]
    fn each_slot_has_its_turn_once_a_round() {
        let turns: std::vec::Vec<_> = (10..20).map(|n| turn(n, 5).unwrap()).collect();
        let slots: std::vec::Vec<_> = turns.iter().map(|&(slot, _)| slot).collect();
        assert_eq!(slots, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
        assert!(turns[..5].iter().all(|&(_, coin)| coin == turns[0].1));
        assert_eq!(turn(7, 0), None);
        assert!(turn(u64::MAX, u32::MAX).is_some());
    }

    #[test]
    fn coins_of_rounds_in_turn_are_spread_evenly() {
        for n_rounds in [10u64, 100, 1_000] {
            let heads =
                (0..n_rounds).filter(|&round| turn(round * 3, 3).unwrap().1 < 0x4000).count();
            // A quarter, to within four rounds, whatever their number.
            assert!((heads as f64 - n_rounds as f64 / 4.0).abs() <= 4.0, "{heads} of {n_rounds}");
        }
    }

    #[test]
    fn an_average_follows_peaks_at_once_and_forgets_them() {
        let rows =
            [(0, 0, 1), (0, 300, 300), (300, 900, 900), (900, 100, 800), (2, 1, 1), (1, 0, 1)];
        for (average, sample, expected) in rows {
            assert_eq!(peak_average_us(average, sample), expected, "{average} {sample}");
        }
        let n = (1..).scan(1_000_000, |average, n| {
            *average = peak_average_us(*average, 500);
            Some((n, *average))
        });
        let arrived = n.take(200).find(|&(_, average)| average == 500);
        assert_eq!(arrived, Some((93, 500)));
        assert_eq!(peak_average_us(u32::MAX, 0), u32::MAX - u32::MAX.div_ceil(8));
    }
}
