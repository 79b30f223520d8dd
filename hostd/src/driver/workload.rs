//! What an instance runs: the image's configuration with the spec's changes, for both kinds.

use std::collections::BTreeMap;

use nix::sys::signal::Signal;
use oci_spec::image::ImageConfiguration;

use super::DriverError;
use crate::api::types::InstanceSpec;
use crate::validate::FieldError;

/// As every container engine has it.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process as the image and the spec want it, users and paths still unresolved.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Workload {
    pub(super) args: Vec<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    pub(super) working_dir: String,
}

impl Workload {
    /// # Errors
    /// Neither the image nor the spec says what to run.
    pub(super) fn new(
        spec: &InstanceSpec,
        image: &ImageConfiguration,
    ) -> Result<Self, DriverError> {
        let config = image.config().clone().unwrap_or_default();
        // Who replaces the entrypoint does not want the arguments that were meant for the old one.
        let (entrypoint, command) = match (&spec.entrypoint, &spec.command) {
            (Some(entrypoint), command) => (Some(entrypoint.clone()), command.clone()),
            (None, Some(command)) => (config.entrypoint().clone(), Some(command.clone())),
            (None, None) => (config.entrypoint().clone(), config.cmd().clone()),
        };
        let mut args = entrypoint.unwrap_or_default();
        args.extend(command.unwrap_or_default());
        if args.first().is_none_or(String::is_empty) {
            return Err(DriverError::Field(
                FieldError::new("/command", "the image does not say what to run")
                    .hint("give a command"),
            ));
        }
        let mut env = BTreeMap::from([("PATH".to_owned(), PATH_DEFAULT.to_owned())]);
        if spec.tty {
            env.insert("TERM".to_owned(), "xterm".to_owned());
        }
        let of_image = config.env().clone().unwrap_or_default();
        env.extend(of_image.iter().filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        }));
        env.extend(spec.env.clone());
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Ok(Self {
            args,
            env,
            user: set(&spec.user).or_else(|| set(config.user())),
            working_dir: set(&spec.working_dir)
                .or_else(|| set(config.working_dir()))
                .unwrap_or_else(|| "/".to_owned()),
        })
    }

    /// The environment as `NAME=value`.
    pub(super) fn environment(&self) -> Vec<String> {
        self.env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    }
}

/// The signal by which the image wants to be stopped; SIGTERM if it does not say, or nonsense.
pub(super) fn stop_signal(image: &ImageConfiguration) -> Signal {
    let text = image
        .config()
        .as_ref()
        .and_then(|config| config.stop_signal().clone())
        .unwrap_or_default();
    let number = text
        .parse::<i32>()
        .ok()
        .and_then(|number| Signal::try_from(number).ok());
    number
        .or_else(|| text.parse().ok())
        .unwrap_or(Signal::SIGTERM)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn image(config: &Value) -> ImageConfiguration {
        serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": []},
        }))
        .unwrap()
    }

    #[test]
    fn entrypoint_and_command_combine_as_in_other_engines() {
        let image = image(&json!({"Entrypoint": ["e"], "Cmd": ["c"]}));
        for (spec, args) in [
            (json!({"image": "a"}), vec!["e", "c"]),
            (json!({"image": "a", "command": ["x"]}), vec!["e", "x"]),
            (json!({"image": "a", "entrypoint": ["y"]}), vec!["y"]),
            (
                json!({"image": "a", "entrypoint": ["y"], "command": ["x"]}),
                vec!["y", "x"],
            ),
            (
                json!({"image": "a", "entrypoint": [], "command": ["x"]}),
                vec!["x"],
            ),
        ] {
            let spec = serde_json::from_value(spec).unwrap();
            assert_eq!(Workload::new(&spec, &image).unwrap().args, args);
        }
    }

    #[test]
    fn the_spec_goes_before_the_image_and_the_image_before_the_defaults() {
        let image = image(&json!({
            "Cmd": ["c"], "Env": ["PATH=/bin", "A=image"], "User": "app", "WorkingDir": "/app",
            "StopSignal": "SIGINT",
        }));
        let spec = serde_json::from_value(json!({"image": "a", "env": {"A": "spec"}})).unwrap();
        let workload = Workload::new(&spec, &image).unwrap();
        assert_eq!(workload.environment(), ["A=spec", "PATH=/bin"]);
        assert_eq!(
            (workload.user.as_deref(), workload.working_dir.as_str()),
            (Some("app"), "/app")
        );
        assert_eq!(stop_signal(&image), Signal::SIGINT);
    }

    #[test]
    fn nothing_to_run_is_the_callers_to_mend() {
        let spec = serde_json::from_value(json!({"image": "a"})).unwrap();
        let error = Workload::new(&spec, &image(&json!({}))).unwrap_err();
        assert!(matches!(error, DriverError::Field(field) if field.field == "/command"));
        assert_eq!(
            stop_signal(&image(&json!({"StopSignal": "?"}))),
            Signal::SIGTERM
        );
    }
}
