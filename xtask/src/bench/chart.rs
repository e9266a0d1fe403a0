//! The README's chart: faults left and time to ready, by backing and way, as an SVG made of the measured rows.
//!
//! Everything is relative to the first way of its panel, so that backings of small and huge pages share an axis;
//! the faults themselves stand beside their bars. Never edited by hand: `cargo xtask bench --chart` writes it.

use super::ready;
use super::samples::Samples;
use crate::project;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::PathBuf;

/// Measures of the drawing, in its own units.
const WIDTH: f64 = 960.0;
const TOP: f64 = 88.0;
const BAR: f64 = 9.0;
const BETWEEN_BACKINGS: f64 = 16.0;

/// Colours follow the viewer's mode, where the viewer has one.
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}\
.small{font-size:10px}.faint{fill:#59636e}.back{fill:#fff}.grid{stroke:#d1d9e0}.edge{stroke:#818b98}\
.c0{fill:#818b98}.c1{fill:#e07b39}.c2{fill:#4c8dd6}.c3{fill:#7cc48d}.c4{fill:#1a7f37}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.faint{fill:#9198a1}.back{fill:#0d1117}\
.grid{stroke:#2f353d}.edge{stroke:#656c76}.c3{fill:#5f9e6e}.c4{fill:#3fb950}}";

/// One half of the chart.
struct Panel {
    title: &'static str,
    axis: &'static str,
    suffix: &'static str,
    /// The ways, what to call them, and their colours; the first is 100 %.
    ways: &'static [(&'static str, &'static str, usize)],
    left: f64,
    width: f64,
    most_percent: f64,
    /// What stands beside a bar: the value itself, or its percentage.
    shows_values: bool,
}

const PANELS: [Panel; 2] = [
    Panel {
        title: "Stage-2 faults left",
        axis: "% of the faults without preparation; the count for 16 MiB beside the bar",
        suffix: ready::FAULTS,
        ways: &[
            (ready::NOTHING, "nothing", 0),
            (ready::IOCTL_ONLY, "KVM_PRE_FAULT_MEMORY only", 1),
            (ready::PREALLOC_ONLY, "prealloc only", 2),
            (ready::TWO_VCPUS, "kvmprep", 4),
        ],
        left: 160.0,
        width: 370.0,
        most_percent: 200.0,
        shows_values: true,
    },
    Panel {
        title: "Time to ready",
        axis: "% of populate-then-pre-fault written by hand; 256 MiB",
        suffix: ready::TIME,
        ways: &[
            (ready::BY_HAND, "by hand, one thread", 0),
            (ready::ONE_VCPU, "kvmprep, 1 vCPU", 3),
            (ready::TWO_VCPUS, "kvmprep, 2 vCPUs", 4),
        ],
        left: 600.0,
        width: 290.0,
        most_percent: 125.0,
        shows_values: false,
    },
];

/// Writes `docs/bench.svg`.
pub fn write(samples: &Samples) -> Result<PathBuf> {
    let path = project::root().join("docs/bench.svg");
    std::fs::create_dir_all(project::root().join("docs")).context("cannot make docs")?;
    std::fs::write(&path, svg(samples)?).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn svg(samples: &Samples) -> Result<String> {
    let backings = samples.comparisons(ready::FAULTS);
    let step = BAR * PANELS[0].ways.len() as f64 + BETWEEN_BACKINGS;
    let bottom = TOP + step * backings.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"Faults left and time to ready, by backing of the guest's memory\">\n\
         <style>{STYLE}</style>\n<rect class=\"back\" width=\"{WIDTH}\" height=\"{height}\"/>\n",
        height = bottom + 58.0
    );
    for (i, backing) in backings.iter().enumerate() {
        let middle = TOP + step * (i as f64 + 0.5);
        text(&mut out, 150.0, middle, "", "end", backing);
    }
    for panel in &PANELS {
        panel.draw_frame(&mut out, bottom);
        for (i, backing) in backings.iter().enumerate() {
            panel.draw_backing(&mut out, samples, backing, TOP + step * i as f64, step)?;
        }
    }
    let note =
        "Real kernel, real KVM, emulated CPU: faults are exact; times compare within one backing only.";
    text(&mut out, WIDTH / 2.0, bottom + 48.0, "small faint", "middle", note);
    out += "</svg>\n";
    Ok(out)
}

impl Panel {
    fn x(&self, percent: f64) -> f64 {
        self.left + self.width * percent.min(self.most_percent) / self.most_percent
    }

    /// Title, legend, axis.
    fn draw_frame(&self, out: &mut String, bottom: f64) {
        text(out, self.left, 24.0, "title", "start", self.title);
        for (i, (_, name, colour)) in self.ways.iter().enumerate() {
            let (x, y) = (self.left + (i % 2) as f64 * 200.0, 40.0 + (i / 2) as f64 * 18.0);
            let _ =
                writeln!(out, "<rect class=\"c{colour}\" x=\"{x}\" y=\"{y}\" width=\"10\" height=\"10\"/>");
            text(out, x + 15.0, y + 9.0, "", "start", name);
        }
        let mut percent = 0.0;
        while percent <= self.most_percent {
            let (x, class) = (self.x(percent), if percent == 0.0 { "edge" } else { "grid" });
            let _ =
                writeln!(out, "<line class=\"{class}\" x1=\"{x}\" y1=\"{TOP}\" x2=\"{x}\" y2=\"{bottom}\"/>");
            text(out, x, bottom + 14.0, "small faint", "middle", &format!("{percent} %"));
            percent += self.most_percent / if self.most_percent > 150.0 { 4.0 } else { 5.0 };
        }
        text(out, self.left, bottom + 30.0, "small faint", "start", self.axis);
    }

    /// The bars of one backing, between `top` and `top + step`.
    fn draw_backing(
        &self,
        out: &mut String,
        samples: &Samples,
        backing: &str,
        top: f64,
        step: f64,
    ) -> Result<()> {
        let what = format!("{backing}{}", self.suffix);
        let whole = samples.median(&what, self.ways[0].0)?;
        let first = top + (step - BAR * self.ways.len() as f64) / 2.0;
        for (i, (way, _, colour)) in self.ways.iter().enumerate() {
            let y = first + BAR * i as f64;
            // Some ways do not exist for every backing.
            let Ok(value) = samples.median(&what, way) else { continue };
            let percent = 100.0 * value / whole;
            let end = self.x(percent);
            let _ = writeln!(
                out,
                "<rect class=\"c{colour}\" x=\"{}\" y=\"{y}\" width=\"{:.1}\" height=\"{}\"/>",
                self.left,
                end - self.left,
                BAR - 1.0
            );
            let label = if self.shows_values { format!("{value}") } else { format!("{percent:.0} %") };
            // A bar of nothing shows whose it is by its label's colour.
            let class = if value == 0.0 { format!("small c{colour}") } else { "small".into() };
            text(out, end + 4.0, y + BAR - 1.0, &class, "start", &label);
        }
        Ok(())
    }
}

fn text(out: &mut String, x: f64, y: f64, class: &str, anchor: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backing_and_way_has_its_bar() {
        let mut samples = Samples::default();
        for panel in &PANELS {
            for (i, (way, ..)) in panel.ways.iter().enumerate() {
                assert!(samples.take(&format!("sample|memfd <shared>{}|{way}|{}", panel.suffix, 100 - i)));
            }
        }
        let drawn = svg(&samples).unwrap();
        assert_eq!(drawn.matches("<rect").count(), 1 + 2 * (4 + 3));
        assert!(drawn.contains("memfd &lt;shared>") && drawn.ends_with("</svg>\n"));
    }

    #[test]
    fn a_bar_never_leaves_its_panel() {
        let panel = &PANELS[0];
        assert_eq!(panel.x(1e9), panel.left + panel.width);
        assert_eq!(panel.x(0.0), panel.left);
    }
}
