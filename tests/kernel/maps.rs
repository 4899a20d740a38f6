//! An operator reads the maps with bpftool, by field name.

use std::process::Command;

use crate::fixture::{Bed, VIP, service};

/// The commands of docs/maps.md print what that page shows.
pub fn the_recipe_works() {
    let mut bed = Bed::small();
    bed.apply(vec![service("web", VIP, &[("10.9.8.7:4321".parse().unwrap(), 1)])]);
    let page = include_str!("../../docs/maps.md");
    let mut n_commands = 0;
    let mut output = String::new();
    for line in page.lines() {
        if let Some(command) = line.strip_prefix("$ bpftool ") {
            let pins = bed.options.bpffs.to_str().unwrap();
            output = bpftool(&command.replace("/sys/fs/bpf/nohop", pins));
            n_commands += 1;
        } else if line.starts_with("        ") {
            let shown = without_blanks(line);
            let at = output.find(&shown);
            let at = at.unwrap_or_else(|| panic!("no {shown} in {output:.2000}"));
            // The next line comes after it.
            output.drain(..at + shown.len());
        }
    }
    assert!(n_commands >= 7, "{n_commands}");
}

/// Every pinned map has type information, the large ones too.
pub fn maps_have_field_names() {
    let mut bed = Bed::small();
    bed.apply(vec![service("web", VIP, &[("10.9.8.7:4321".parse().unwrap(), 1)])]);
    let maps = bed.options.bpffs.join(format!("v{}/maps", bed.options.layout));
    let mut n_maps = 0;
    for pin in std::fs::read_dir(maps).unwrap() {
        let pin = pin.unwrap().path();
        let shown = bpftool(&format!("-j map show pinned {}", pin.display()));
        assert!(shown.contains("\"btf_id\":"), "{}: {shown}", pin.display());
        n_maps += 1;
    }
    // 13, and four of the unit `names`.
    assert_eq!(n_maps, 17);
}

/// bpftool's output, without blanks.
fn bpftool(arguments: &str) -> String {
    let output = Command::new("bpftool").args(arguments.split_whitespace()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "bpftool {arguments}: {error}");
    without_blanks(&String::from_utf8(output.stdout).unwrap())
}

fn without_blanks(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).collect()
}
