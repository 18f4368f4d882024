// SPDX-License-Identifier: Apache-2.0
//! `sluice nodes`: who is in the cluster, as the daemon sees it.

use std::io::{self, Write};

use clap::Args;
use serde_json::{Value, json};
use sluice_proto::control::{NodesRequest, NodesResponse};

use super::control::{CALL_TIMEOUT, DaemonArguments, connect, within};
use super::show::Table;

/// Arguments of `nodes`.
#[derive(Debug, Args)]
pub(super) struct Nodes {
    #[command(flatten)]
    daemon: DaemonArguments,
}

pub(super) async fn run(arguments: Nodes) -> anyhow::Result<()> {
    let mut client = connect(&arguments.daemon.socket).await?;
    let answer = within(CALL_TIMEOUT, client.nodes(NodesRequest {}))
        .await?
        .into_inner();
    let mut out = io::stdout().lock();
    if arguments.daemon.json {
        writeln!(out, "{}", nodes_json(&answer))?;
    } else {
        write_nodes(&mut out, &answer)?;
    }
    Ok(())
}

/// What is not said is a dash: a cell that is empty reads like a fault of the table.
fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

fn write_nodes(out: &mut impl Write, answer: &NodesResponse) -> io::Result<()> {
    if !answer.clustered {
        return writeln!(
            out,
            "this node is in no cluster: [cluster] is not enabled in the configuration of sluiced"
        );
    }
    let mut table = Table::new(&[
        "NAME",
        "ZONE",
        "RACK",
        "ROLE",
        "ADDRESS",
        "VERSION",
        "LOAD",
        "FREE SLOTS",
        "DISTANCE",
    ]);
    for node in &answer.nodes {
        table.row([
            node.name.clone(),
            node.zone.clone(),
            or_dash(&node.rack),
            node.role.clone(),
            node.address.clone(),
            or_dash(&node.version),
            format!("{} %", node.load_percent),
            node.free_slots.to_string(),
            node.distance.clone(),
        ]);
    }
    table.write(out)
}

fn nodes_json(answer: &NodesResponse) -> Value {
    json!({
        "clustered": answer.clustered,
        "nodes": answer.nodes.iter().map(|node| json!({
            "name": node.name,
            "zone": node.zone,
            "rack": node.rack,
            "role": node.role,
            "address": node.address,
            "version": node.version,
            "protocol": node.protocol,
            "load_percent": node.load_percent,
            "free_slots": node.free_slots,
            "distance": node.distance,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use sluice_proto::control::ClusterNode;

    use super::*;

    fn shown(answer: &NodesResponse) -> String {
        let mut out = Vec::new();
        write_nodes(&mut out, answer).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn nodes_read_well() {
        let node = |name: &str, rack: &str, distance: &str| ClusterNode {
            name: name.into(),
            zone: "eu-1".into(),
            rack: rack.into(),
            role: "node".into(),
            address: "10.0.0.1:9641".into(),
            version: "0.1.0".into(),
            protocol: 1,
            load_percent: 37,
            free_slots: 5,
            distance: distance.into(),
        };
        let answer = NodesResponse {
            clustered: true,
            nodes: vec![node("a", "r1", "self"), node("b", "", "zone")],
        };
        let text = shown(&answer);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let row = |name, rack, distance| {
            let address = "10.0.0.1:9641";
            vec![
                name, "eu-1", rack, "node", address, "0.1.0", "37", "%", "5", distance,
            ]
        };
        assert_eq!(lines[0][..4], ["NAME", "ZONE", "RACK", "ROLE"]);
        assert_eq!(lines[1], row("a", "r1", "self"));
        assert_eq!(lines[2], row("b", "-", "zone"));
        let json = nodes_json(&answer);
        assert_eq!(json["nodes"][1]["load_percent"], 37);
        assert_eq!(json["clustered"], true);
    }

    #[test]
    fn a_node_without_a_cluster_says_so() {
        let answer = NodesResponse::default();
        assert!(shown(&answer).contains("[cluster] is not enabled"));
        assert_eq!(
            nodes_json(&answer),
            json!({"clustered": false, "nodes": []})
        );
    }
}
