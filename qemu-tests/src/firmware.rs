//! Firmware that prints before the kernel does.
//!
//! OpenSBI prints some sixty lines, from a banner to the delegation of the boot CPU's exceptions. They are nothing that the
//! guest says: a kernel that prints nothing after them has printed nothing.

/// What the first line of OpenSBI begins with.
const FIRST: &str = "OpenSBI v";
/// What its last line begins with.
const LAST: &str = "Boot HART MEDELEG";

/// Whose words a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// The firmware.
    Firmware,
    /// The kernel.
    Guest,
}

/// Tells firmware's lines from the kernel's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Listener {
    /// Nothing was said so far.
    #[default]
    Nothing,
    /// The firmware is speaking.
    Firmware,
    /// It is not, and will not again.
    Guest,
}

impl Listener {
    /// Takes the next line and says whose it is. Where firmware never finishes, a line of the protocol ends it.
    pub(crate) fn line(&mut self, line: &str) -> Speaker {
        let (speaker, next) = match self {
            Self::Nothing if line.trim().is_empty() => (Speaker::Firmware, Self::Nothing),
            Self::Nothing if line.starts_with(FIRST) => (Speaker::Firmware, Self::Firmware),
            Self::Firmware if line.starts_with(LAST) => (Speaker::Firmware, Self::Guest),
            Self::Firmware if !line.starts_with("@@") => (Speaker::Firmware, Self::Firmware),
            Self::Nothing | Self::Firmware | Self::Guest => (Speaker::Guest, Self::Guest),
        };
        *self = next;
        speaker
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(text: &str) -> Vec<&str> {
        let mut listener = Listener::default();
        text.lines().filter(|line| listener.line(line) == Speaker::Guest).collect()
    }

    #[test]
    fn what_opensbi_prints_is_not_the_guests() {
        let opensbi =
            "\nOpenSBI v1.5.1\n   ____\n\nPlatform Name : riscv-virtio\nBoot HART MEDELEG         : 0x1\n";
        assert_eq!(
            guest(&format!("{opensbi}\nkernel\n@@ start 1 riscv64")),
            ["", "kernel", "@@ start 1 riscv64"]
        );
        assert!(guest(opensbi).is_empty());
    }

    #[test]
    fn without_firmware_every_line_is_the_guests() {
        assert_eq!(guest("kernel\nOpenSBI v1\n@@ end PASS"), ["kernel", "OpenSBI v1", "@@ end PASS"]);
        assert_eq!(guest("@@ end PASS"), ["@@ end PASS"]);
    }

    #[test]
    fn firmware_that_ends_otherwise_hides_nothing_of_the_protocol() {
        assert_eq!(
            guest("OpenSBI v9\nsomething else\n@@ start 1 riscv64\ntext"),
            ["@@ start 1 riscv64", "text"]
        );
    }
}
