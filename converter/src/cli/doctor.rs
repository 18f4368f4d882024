// SPDX-License-Identifier: Apache-2.0
//! `sluice doctor`: everything that may be wrong on this node, in one list.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use sluice_fetcher::registry::ImageReference;
use sluice_proto::control::control_client::ControlClient;
use sluice_proto::control::examine_event::Event;
use sluice_proto::control::{ExamineRequest, Severity as Level};
use tonic::transport::Channel;

use super::control::DaemonArguments;
use super::setup::containerd_major;
use super::show::printable;
use crate::doctor::{Done, Finding, Severity, exit_code, look};
use crate::grpc;
use crate::setup::Wanted;

/// Nothing could be examined.
pub(super) const NOT_EXAMINED: u8 = 3;

/// How long the daemon may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long it may be silent: it says something every five seconds.
const SILENCE: Duration = Duration::from_secs(30);
/// How long `containerd --version` may take.
const VERSION: Duration = Duration::from_secs(5);

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// Read every byte of the chunk store and compare it with its digest.
    #[arg(long)]
    deep: bool,
    /// Repair what can be repaired.
    #[arg(long)]
    fix: bool,
    /// Ask the registry of this image whether it answers and lets this node in.
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// containerd's configuration file.
    #[arg(
        long,
        default_value = "/etc/containerd/config.toml",
        value_name = "FILE"
    )]
    containerd_config: PathBuf,
    /// The containerd program, asked for its version.
    #[arg(long, default_value = "containerd")]
    containerd: PathBuf,
    /// Kubernetes' CRI plugin must use Sluice as well.
    #[arg(long)]
    cri: bool,
    /// sluiced's root directory, where the daemon does not say.
    #[arg(long, default_value = "/var/lib/sluice")]
    root: PathBuf,
    #[command(flatten)]
    daemon: DaemonArguments,
}

/// What was found, and by which checks.
#[derive(Debug, Default)]
struct Examination {
    findings: Vec<Finding>,
    checks: Vec<Done>,
    /// As the daemon says.
    places: Option<(PathBuf, PathBuf)>,
}

impl Examination {
    fn add(&mut self, (findings, done): look::Looked) {
        self.findings.extend(findings);
        self.checks.push(done);
    }
}

/// Examines, shows, and says how it stands by the exit code.
pub(super) fn run(arguments: &Doctor) -> ExitCode {
    // Not dropped at the end: that would wait for a thread that hangs in what is being examined.
    let runtime = match tokio::runtime::Runtime::new().context("start runtime") {
        Ok(runtime) => runtime,
        Err(error) => return not_examined(&error),
    };
    let examined = runtime.block_on(async {
        tokio::select! {
            examined = examine(arguments) => Ok(examined),
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        }
    });
    runtime.shutdown_background();
    let examined = match examined {
        Ok(examined) => examined,
        Err(error) => return not_examined(&error),
    };
    let mut out = io::stdout().lock();
    let written = match arguments.daemon.json() {
        true => write_json(&mut out, &examined),
        false => write_list(&mut out, &examined),
    };
    match written {
        // Whoever stopped reading wants the exit code still.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => not_examined(&error.into()),
        _ => ExitCode::from(exit_code(&examined.findings)),
    }
}

fn not_examined(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "sluice: {error:#}");
    ExitCode::from(NOT_EXAMINED)
}

async fn examine(arguments: &Doctor) -> Examination {
    let mut all = Examination::default();
    ask_daemon(arguments, &mut all).await;
    let socket = arguments.daemon.socket();
    let run = socket.parent().unwrap_or(Path::new("/")).to_owned();
    let places = all.places.clone();
    let (root, run) = places.unwrap_or_else(|| (arguments.root.clone(), run));
    let wanted = Wanted {
        address: run.join("snapshots.sock").to_string_lossy().into_owned(),
        root: root.to_string_lossy().into_owned(),
        cri: arguments.cri,
        containerd_major: version_of(&arguments.containerd).await,
    };
    all.add(look::kernel().await);
    all.add(look::containerd(arguments.containerd_config.clone(), wanted).await);
    all.add(look::sockets(&run).await);
    all.add(look::connections(&root, &run, arguments.fix).await);
    let image = arguments.image.as_deref();
    let name = image.map(|image| image.strip_prefix("docker://").unwrap_or(image));
    let reference = name.and_then(|name| name.parse::<ImageReference>().ok());
    all.add(look::clock(reference.as_ref().map(ImageReference::host)).await);
    all
}

async fn version_of(program: &Path) -> Option<u32> {
    let program = program.to_owned();
    let asked = tokio::task::spawn_blocking(move || containerd_major(&program));
    tokio::time::timeout(VERSION, asked).await.ok()?.ok()?
}

/// Has the daemon examine itself. That it does not is a finding like others.
async fn ask_daemon(arguments: &Doctor, all: &mut Examination) {
    const CHECK: &str = "daemon";
    let socket = arguments.daemon.socket();
    let finding = |problem: String, advice: &str| {
        Finding::new(CHECK, Severity::Error, socket.display(), problem).advice(advice)
    };
    let connected = tokio::time::timeout(CONNECT, grpc::connect(socket)).await;
    let problem = match connected {
        Ok(Ok(channel)) => follow(ControlClient::new(channel), arguments, all)
            .await
            .err(),
        Ok(Err(_)) => Some(
            "sluiced is not running: new containers do not start, and reads of missing data wait"
                .to_owned(),
        ),
        Err(_) => Some(format!(
            "sluiced takes no connection within {} s",
            CONNECT.as_secs()
        )),
    };
    if let Some(problem) = problem {
        let advice = "start it, or look at its log: journalctl -u sluiced";
        all.findings.push(finding(problem, advice));
    }
    all.checks.push(Done {
        check: CHECK.to_owned(),
        looked_at: 1,
    });
}

/// Takes what the daemon tells; the error says why it did not tell all.
async fn follow(
    mut client: ControlClient<Channel>,
    arguments: &Doctor,
    all: &mut Examination,
) -> Result<(), String> {
    let request = ExamineRequest {
        deep: arguments.deep,
        fix: arguments.fix,
        image: arguments.image.clone().unwrap_or_default(),
    };
    let silent = |_| format!("sluiced says nothing for {} s", SILENCE.as_secs());
    let refused = |status: tonic::Status| match status.code() {
        tonic::Code::Unimplemented => "sluiced is too old to examine itself".to_owned(),
        _ => format!("sluiced: {}", status.message()),
    };
    let begun = tokio::time::timeout(SILENCE, client.examine(request)).await;
    let mut events = begun.map_err(silent)?.map_err(refused)?.into_inner();
    loop {
        let event = tokio::time::timeout(SILENCE, events.message()).await;
        let Some(event) = event.map_err(silent)?.map_err(refused)? else {
            return Ok(());
        };
        match event.event {
            Some(Event::Examiner(daemon)) => {
                all.places = Some((daemon.root.into(), daemon.run.into()));
                all.findings.extend(skew(&daemon.version));
            }
            Some(Event::Finding(told)) => {
                let severity = match told.severity() {
                    Level::Info => Severity::Info,
                    Level::Warning => Severity::Warning,
                    Level::Error | Level::Unspecified => Severity::Error,
                };
                all.findings.push(Finding {
                    check: told.check,
                    severity,
                    subject: told.subject,
                    problem: told.problem,
                    advice: told.advice,
                    repairable: told.repairable,
                    repaired: told.repaired,
                });
            }
            Some(Event::Done(done)) => all.checks.push(Done {
                check: done.check,
                looked_at: done.looked_at,
            }),
            Some(Event::Progress(step)) if !arguments.daemon.json() => {
                let subject = printable(&step.subject).into_owned();
                let _ = writeln!(
                    io::stderr(),
                    "{}: {} looked at, now {subject}",
                    step.check,
                    step.looked_at
                );
            }
            Some(Event::Progress(_)) | None => {}
        }
    }
}

/// Whether the daemon is of another version than this program.
fn skew(daemon: &str) -> Option<Finding> {
    let ours = env!("CARGO_PKG_VERSION");
    (daemon != ours).then(|| {
        let problem = format!("sluiced is {daemon}, sluice is {ours}");
        Finding::new("daemon", Severity::Warning, "versions", problem)
            .advice("restart sluiced after an upgrade: containers go on meanwhile")
    })
}

/// One line for each finding, the worst first.
fn write_list(out: &mut impl Write, all: &Examination) -> io::Result<()> {
    let mut findings: Vec<&Finding> = all.findings.iter().collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    let width = findings.iter().map(|it| it.check.len()).max().unwrap_or(0);
    for finding in &findings {
        let word = match finding.repaired {
            true => "FIXED",
            false => finding.severity.as_str(),
        };
        let mut line = format!(
            "{word:<7}  {:<width$}  {}: {}",
            finding.check, finding.subject, finding.problem
        );
        if !finding.advice.is_empty() {
            line.push_str(&format!(" ({})", finding.advice));
        }
        writeln!(out, "{}", printable(&line))?;
    }
    let count = |severity| {
        let left = findings.iter().filter(|finding| !finding.repaired);
        left.filter(|finding| finding.severity == severity).count()
    };
    writeln!(
        out,
        "{} checks: {} errors, {} warnings, {} notes, {} repaired",
        all.checks.len(),
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Info),
        findings.iter().filter(|finding| finding.repaired).count(),
    )
}

fn write_json(out: &mut impl Write, all: &Examination) -> io::Result<()> {
    let document = json!({
        "findings": all.findings,
        "checks": all.checks,
        "exit_code": exit_code(&all.findings),
    });
    writeln!(out, "{document}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_aligned_and_ends_with_the_sum() {
        let fixed = Finding {
            repaired: true,
            ..Finding::new("content", Severity::Error, "layer x", "rotted")
        };
        let all = Examination {
            findings: vec![
                Finding::new("clock", Severity::Info, "clock", "ticks"),
                Finding::new("connections", Severity::Warning, "/m", "waits\u{1b}[2J")
                    .advice("look"),
                fixed,
            ],
            checks: vec![Done {
                check: "clock".into(),
                looked_at: 1,
            }],
            places: None,
        };
        let mut out = Vec::new();
        write_list(&mut out, &all).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "FIXED    content      layer x: rotted");
        assert!(
            lines[1].starts_with("WARNING  connections  /m: waits"),
            "{text}"
        );
        assert!(
            lines[1].ends_with("(look)") && !text.contains('\u{1b}'),
            "{text}"
        );
        assert_eq!(lines[2], "INFO     clock        clock: ticks");
        assert_eq!(
            lines[3],
            "1 checks: 0 errors, 1 warnings, 1 notes, 1 repaired"
        );
        let mut out = Vec::new();
        write_json(&mut out, &all).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["findings"][1]["severity"], "warning");
        assert_eq!(json["exit_code"], 1);
    }

    #[test]
    fn another_version_is_a_warning() {
        assert_eq!(skew(env!("CARGO_PKG_VERSION")), None);
        assert_eq!(skew("0.0.0").map(|it| it.severity), Some(Severity::Warning));
    }
}
