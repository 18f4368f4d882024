// SPDX-License-Identifier: Apache-2.0
//! kubelet's `CredentialProviderConfig`: which plugins there are, and which images each is for. Pure.
//!
//! **Source** Kubernetes, kubelet configuration v1, `CredentialProviderConfig`; v1beta1 and v1alpha1 are the same but for
//! their names. Unknown keys mean nothing: later versions have more.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use super::exchange::Version;
use crate::registry::credentials::target::Pattern;
use crate::registry::hosts::go_duration;

/// Plugins of one configuration.
const MOST_PLUGINS: usize = 32;

/// A plugin, ready to be run.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Plugin {
    /// The program's name in the directory of plugins.
    pub(super) name: String,
    pub(super) images: Vec<Pattern>,
    /// How long an answer counts that does not say.
    pub(super) life: Duration,
    pub(super) version: Version,
    pub(super) arguments: Vec<String>,
    /// Added to the daemon's own environment. May be secret.
    pub(super) environment: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

/// Reads a configuration, YAML or JSON, which is YAML too.
///
/// **Errors** what is wrong and where; its values are not repeated, an environment may be secret.
pub(super) fn parse(text: &str) -> Result<Vec<Plugin>, String> {
    let document: Document = serde_saphyr::from_str(text).map_err(|error| {
        let line = error.location().map_or(0, |at| at.line());
        format!("no CredentialProviderConfig (line {line})")
    })?;
    let versions = ["v1", "v1beta1", "v1alpha1"];
    let known = document.api_version.strip_prefix("kubelet.config.k8s.io/");
    if !known.is_some_and(|version| versions.contains(&version)) {
        return Err("apiVersion: want kubelet.config.k8s.io/v1, v1beta1 or v1alpha1".to_owned());
    }
    if document.kind != "CredentialProviderConfig" {
        return Err("kind: want CredentialProviderConfig".to_owned());
    }
    if document.providers.len() > MOST_PLUGINS {
        return Err(format!("providers: more than {MOST_PLUGINS}"));
    }
    let mut names = BTreeSet::new();
    let mut plugins = Vec::new();
    for provider in document.providers {
        let name = provider.name.clone();
        let shown: String = name.chars().take(100).collect();
        let plugin =
            plugin(provider).map_err(|problem| format!("provider {shown:?}: {problem}"))?;
        if !names.insert(name) {
            return Err(format!("provider {shown:?}: named twice"));
        }
        plugins.push(plugin);
    }
    Ok(plugins)
}

fn plugin(provider: Provider) -> Result<Plugin, String> {
    let name = provider.name;
    // As kubelet: a name leads nowhere else.
    if name.is_empty() || matches!(name.as_str(), "." | "..") || name.contains(['/', ' ', '\0']) {
        return Err("name: want the name of a file".to_owned());
    }
    if provider.token_attributes.is_some() {
        return Err(
            "tokenAttributes: service account tokens are kubelet's to give; not supported"
                .to_owned(),
        );
    }
    if provider.match_images.is_empty() {
        return Err("matchImages: want at least one".to_owned());
    }
    let patterns = provider.match_images.iter();
    let patterns = patterns.map(|text| Pattern::parse(text));
    let images = patterns.collect::<Result<_, _>>();
    let images = images.map_err(|problem| format!("matchImages: {problem}"))?;
    let version = Version::parse(&provider.api_version)
        .ok_or("apiVersion: want credentialprovider.kubelet.k8s.io/v1, v1beta1 or v1alpha1")?;
    let life = provider.default_cache_duration;
    let life = life.ok_or("defaultCacheDuration: missing")?;
    let life = go_duration(&life).ok_or("defaultCacheDuration: want a time such as \"12h\"")?;
    let environment = provider.env.unwrap_or_default().into_iter();
    let environment: Vec<_> = environment.map(|it| (it.name, it.value)).collect();
    let arguments = provider.args.unwrap_or_default();
    let names = environment.iter().map(|(name, _)| name);
    if names
        .clone()
        .any(|name| name.is_empty() || name.contains('='))
        || environment
            .iter()
            .flat_map(|(a, b)| [a, b])
            .chain(&arguments)
            .any(|it| it.contains('\0'))
    {
        return Err("env, args: not what a program can be given".to_owned());
    }
    Ok(Plugin {
        name,
        images,
        life,
        version,
        arguments,
        environment,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::CredentialTarget;

    const YAML: &str = "
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  # As the documentation of Kubernetes has it.
  - name: ecr-credential-provider
    matchImages:
      - \"*.dkr.ecr.*.amazonaws.com\"
      - registry.example:8080/path
    defaultCacheDuration: \"12h\"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - --v=4
    env:
      - name: AWS_PROFILE
        value: example_profile
";

    #[test]
    fn yaml_and_json_say_the_same() {
        let parsed = parse(YAML).unwrap_or_else(|problem| panic!("{problem}"));
        let plugin = &parsed[0];
        assert_eq!(
            (parsed.len(), plugin.name.as_str()),
            (1, "ecr-credential-provider")
        );
        assert_eq!(plugin.life, Duration::from_secs(12 * 3600));
        assert_eq!(plugin.version, Version::V1);
        assert_eq!(plugin.arguments, ["--v=4"]);
        let variable = ("AWS_PROFILE".to_owned(), "example_profile".to_owned());
        assert_eq!(plugin.environment, [variable]);
        let matches = |host: &str, repository: &str| {
            let target = CredentialTarget::new(host, repository);
            plugin.images.iter().any(|pattern| pattern.matches(&target))
        };
        assert!(matches("1.dkr.ecr.eu.amazonaws.com", "a"));
        assert!(
            matches("registry.example:8080", "path/a") && !matches("registry.example:8080", "a")
        );
        let json = r#"{"apiVersion":"kubelet.config.k8s.io/v1","kind":"CredentialProviderConfig",
            "providers":[{"name":"ecr-credential-provider",
            "matchImages":["*.dkr.ecr.*.amazonaws.com","registry.example:8080/path"],
            "defaultCacheDuration":"12h","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
            "args":["--v=4"],"env":[{"name":"AWS_PROFILE","value":"example_profile"}]}]}"#;
        assert!(parse(json).unwrap_or_else(|problem| panic!("{problem}")) == parsed);
        let nothing = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: CredentialProviderConfig\n";
        assert!(
            parse(nothing)
                .unwrap_or_else(|problem| panic!("{problem}"))
                .is_empty()
        );
    }

    #[test]
    fn errors_name_the_key_and_keep_values_to_themselves() {
        let twice = format!("{YAML}{}", YAML.split_once("providers:\n").unwrap().1);
        let with = |from: &str, to: &str| {
            assert!(YAML.contains(from), "{from}");
            YAML.replace(from, to)
        };
        let bombs = format!(
            "a: &a [x,x,x,x,x,x,x,x,x]\n{}",
            ('b'..='k')
                .zip('a'..)
                .map(|(own, other)| format!(
                    "{own}: &{own} [{}]\n",
                    vec![format!("*{other}"); 9].join(",")
                ))
                .collect::<String>()
        );
        let cases = [
            (String::new(), "no CredentialProviderConfig"),
            ("{".to_owned(), "no CredentialProviderConfig (line 1)"),
            (bombs, "no CredentialProviderConfig"),
            (
                with("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v9"),
                "apiVersion: want kubelet",
            ),
            (with("kind: Cred", "kind: X"), "kind: want"),
            (
                with("ecr-credential-provider", "../ecr"),
                "\"../ecr\": name",
            ),
            (
                with("credentialprovider.kubelet.k8s.io/v1", "v1"),
                "apiVersion: want credentialprovider",
            ),
            (with("\"12h\"", "soon"), "defaultCacheDuration: want"),
            (with("\"12h\"", "\"-1s\""), "defaultCacheDuration: want"),
            (
                with("    defaultCacheDuration: \"12h\"\n", ""),
                "defaultCacheDuration: missing",
            ),
            (
                with("registry.example:8080/path", "registry.example:any"),
                "matchImages: the port",
            ),
            (
                with("    env:", "    tokenAttributes: {}\n    env:"),
                "not supported",
            ),
            (with("name: AWS_PROFILE", "name: A=B"), "env, args"),
            (
                with("value: example_profile", "value: [hunter2]"),
                "no CredentialProviderConfig (line",
            ),
            (twice, "named twice"),
        ];
        for (text, problem) in cases {
            let error = parse(&text).map(drop).unwrap_err();
            assert!(error.contains(problem), "{error}, want {problem}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
