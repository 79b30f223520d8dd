//! What `linux.resources` asks for, as a list of files to write: dispatches to the controllers and
//! handles those that need no file of their own. Device rules are in `devices`.
//!
//! A resource that this host cannot honour is an error that names the field; nothing is ignored.
//! As in the other runtimes, the value 0 means "unset" where 0 would be no sensible limit.

use std::path::{Path, PathBuf};

use libcgroups::stats::supported_page_sizes;
use oci_spec::runtime::{LinuxHugepageLimit, LinuxNetwork, LinuxPids, LinuxRdma, LinuxResources};

use super::{CgroupError, Directory, cpu, hierarchy::Version, io, memory, setting::Setting};

/// Plans everything but the device rules. The directories exist: some choices depend on which
/// files are in them, and on what is in these.
pub(super) fn plan(
    directories: &[Directory],
    resources: &LinuxResources,
) -> Result<Vec<Setting>, CgroupError> {
    let mut settings = Vec::new();
    for (controller, plan) in sections(resources) {
        let controller = match controller {
            "io" if has(directories, "blkio") => "blkio",
            controller => controller,
        };
        settings.extend(plan_section(directories, controller, &*plan)?);
    }
    settings.extend(plan_unified(directories, resources)?);
    Ok(settings)
}

/// What is asked of each controller, in the order in which it is set.
fn sections(resources: &LinuxResources) -> Vec<(&'static str, Box<Planner<'_>>)> {
    let mut sections: Vec<(&'static str, Box<Planner<'_>>)> = Vec::new();
    if let Some(memory) = resources.memory() {
        let plan = move |directory: &Directory| memory::plan(directory, memory);
        sections.push(("memory", Box::new(plan)));
    }
    if let Some(cpu) = resources.cpu() {
        let plan = move |directory: &Directory| cpu::plan(directory, cpu);
        sections.push(("cpu", Box::new(plan)));
        let plan = move |directory: &Directory| Ok(cpu::plan_sets(directory, cpu));
        sections.push(("cpuset", Box::new(plan)));
    }
    if let Some(pids) = resources.pids() {
        let plan = move |directory: &Directory| Ok(plan_pids(directory, pids));
        sections.push(("pids", Box::new(plan)));
    }
    if let Some(block) = resources.block_io() {
        let plan = move |directory: &Directory| io::plan(directory, block);
        sections.push(("io", Box::new(plan)));
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let plan = move |directory: &Directory| plan_hugepages(directory, limit);
        sections.push(("hugetlb", Box::new(plan)));
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let plan = move |directory: &Directory| plan_rdma(directory, device, limit);
        sections.push(("rdma", Box::new(plan)));
    }
    if let Some(network) = resources.network() {
        let plan = move |directory: &Directory| Ok(plan_class(directory, network));
        sections.push(("net_cls", Box::new(plan)));
        let plan = move |directory: &Directory| Ok(plan_priorities(directory, network));
        sections.push(("net_prio", Box::new(plan)));
    }
    sections
}

/// A controller without which a field cannot be honoured.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Need {
    pub(super) controller: String,
    pub(super) field: String,
}

/// The controllers that `resources` needs, for enabling them on v2. A section that asks for nothing needs
/// none.
pub(super) fn controllers_needed(resources: &LinuxResources) -> Vec<Need> {
    let nowhere = nowhere();
    let need = |(controller, plan): (&str, Box<Planner<'_>>)| {
        let field = match plan(&nowhere) {
            Ok(settings) => settings.first()?.field.to_string(),
            // What is wrong is told when it is set.
            Err(_) => controller.to_owned(),
        };
        Some(Need {
            controller: controller.to_owned(),
            field,
        })
    };
    let mut needed: Vec<Need> = sections(resources).into_iter().filter_map(need).collect();
    let unified = resources.unified().iter().flatten();
    needed.extend(unified.filter_map(|(file, _)| {
        Some(Need {
            controller: file.split_once('.')?.0.to_owned(),
            field: format!("unified.{file}"),
        })
    }));
    needed
}

/// The first field that needs a control group.
pub(crate) fn first_limit(resources: &LinuxResources) -> Option<String> {
    let need = controllers_needed(resources).into_iter().next()?;
    Some(format!("linux.resources.{}", need.field))
}

/// A directory that is not there.
fn nowhere() -> Directory {
    Directory {
        version: Version::V2,
        controllers: Vec::new(),
        path: Path::new("/nonexistent").to_owned(),
        root: PathBuf::new(),
    }
}

type Planner<'a> = dyn Fn(&Directory) -> Result<Vec<Setting>, CgroupError> + 'a;

fn has(directories: &[Directory], controller: &str) -> bool {
    directories
        .iter()
        .any(|directory| directory.has(controller))
}

fn plan_section(
    directories: &[Directory],
    controller: &str,
    plan: &Planner<'_>,
) -> Result<Vec<Setting>, CgroupError> {
    if let Some(directory) = directories
        .iter()
        .find(|directory| directory.has(controller))
    {
        return plan(directory);
    }
    // A section that asks for nothing can be honoured anywhere; v2 has fewer ways to say so.
    match plan(&nowhere())?.first() {
        None => Ok(Vec::new()),
        Some(setting) => {
            let reason = format!("no hierarchy of this host has the {controller} controller");
            let field = setting.field.clone();
            Err(CgroupError::invalid(field, &setting.value, reason))
        }
    }
}

/// Less than zero means no limit. Zero is one: where no process may be, none more may be, and systemd
/// has no word for zero.
fn plan_pids(directory: &Directory, pids: &LinuxPids) -> Vec<Setting> {
    let value = match pids.limit() {
        limit if limit >= 0 => limit.max(1).to_string(),
        _ => "max".to_owned(),
    };
    vec![Setting::new(
        "pids.limit",
        &directory.path,
        "pids.max",
        value,
    )]
}

fn plan_hugepages(
    directory: &Directory,
    limit: &LinuxHugepageLimit,
) -> Result<Vec<Setting>, CgroupError> {
    let size = limit.page_size();
    let sizes = supported_page_sizes().unwrap_or_default();
    if !sizes.contains(size) {
        let reason = format!("this host has pages of {}", sizes.join(", "));
        return Err(CgroupError::invalid(
            "hugepageLimits.pageSize",
            size,
            reason,
        ));
    }
    let (end, value) = match directory.version {
        Version::V1 => ("limit_in_bytes", limit.limit().to_string()),
        Version::V2 if limit.limit() < 0 => ("max", "max".to_owned()),
        Version::V2 => ("max", limit.limit().to_string()),
    };
    let field = "hugepageLimits.limit";
    // Reserved pages were added later, and without them a page fault can still be refused.
    let reserved = format!("hugetlb.{size}.rsvd.{end}");
    Ok(vec![
        Setting::new(
            field,
            &directory.path,
            &format!("hugetlb.{size}.{end}"),
            value.clone(),
        ),
        Setting::new(field, &directory.path, &reserved, value).satisfied_if_absent(),
    ])
}

fn plan_rdma(
    directory: &Directory,
    device: &str,
    limit: &LinuxRdma,
) -> Result<Vec<Setting>, CgroupError> {
    let handles = limit
        .hca_handles()
        .map(|count| format!(" hca_handle={count}"));
    let objects = limit
        .hca_objects()
        .map(|count| format!(" hca_object={count}"));
    if handles.is_none() && objects.is_none() {
        let reason = "it needs hcaHandles, hcaObjects or both";
        return Err(CgroupError::invalid(format!("rdma.{device}"), "{}", reason));
    }
    let value = format!(
        "{device}{}{}",
        handles.unwrap_or_default(),
        objects.unwrap_or_default()
    );
    Ok(vec![Setting::new(
        format!("rdma.{device}"),
        &directory.path,
        "rdma.max",
        value,
    )])
}

fn plan_class(directory: &Directory, network: &LinuxNetwork) -> Vec<Setting> {
    let class = network.class_id().filter(|class| *class != 0);
    let setting =
        |class| Setting::new("network.classID", &directory.path, "net_cls.classid", class);
    class.map(setting).into_iter().collect()
}

fn plan_priorities(directory: &Directory, network: &LinuxNetwork) -> Vec<Setting> {
    let priorities = network.priorities().iter().flatten().map(|priority| {
        let value = format!("{} {}", priority.name(), priority.priority());
        Setting::new(
            "network.priorities",
            &directory.path,
            "net_prio.ifpriomap",
            value,
        )
    });
    priorities.collect()
}

/// Plans the raw files of v2, in the order of their names so that equal requests act equally.
fn plan_unified(
    directories: &[Directory],
    resources: &LinuxResources,
) -> Result<Vec<Setting>, CgroupError> {
    let mut entries: Vec<_> = resources.unified().iter().flatten().collect();
    entries.sort();
    let unified = directories
        .iter()
        .find(|directory| directory.version == Version::V2);
    let mut settings = Vec::new();
    for (file, value) in entries {
        let field = format!("unified.{file}");
        let controller = file.split_once('.').map(|(controller, _)| controller);
        let Some(controller) = controller.filter(|_| !file.contains('/')) else {
            let reason = "the key is the name of a file, as memory.high";
            return Err(CgroupError::invalid(field, value, reason));
        };
        match unified.filter(|unified| controller == "cgroup" || unified.has(controller)) {
            // One write is one line, as for the limits of several devices.
            Some(unified) => settings.extend(
                value
                    .lines()
                    .map(|line| Setting::new(field.clone(), &unified.path, file, line)),
            ),
            None => {
                let reason = format!(
                    "{controller} is not a controller of cgroup v2 on this host: invalid configuration"
                );
                return Err(CgroupError::invalid(field, value, reason));
            }
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use oci_spec::runtime::{LinuxPidsBuilder, LinuxResourcesBuilder};

    use super::*;

    fn directory(version: Version, controllers: &[&str]) -> Directory {
        Directory {
            version,
            controllers: controllers.iter().map(|&name| name.to_owned()).collect(),
            path: Path::new("/cg").join(controllers.join(",")),
            root: PathBuf::from("/cg"),
        }
    }

    #[test]
    fn each_controller_is_found_in_its_own_hierarchy() {
        let directories = [
            directory(Version::V2, &["hugetlb", "pids"]),
            directory(Version::V1, &["memory"]),
        ];
        let resources: LinuxResources =
            serde_json::from_str(r#"{"memory":{"limit":1000},"pids":{"limit":7}}"#).unwrap();
        let settings = plan(&directories, &resources).unwrap();
        let files: Vec<_> = settings
            .iter()
            .map(|setting| setting.file.to_str().unwrap())
            .collect();
        assert_eq!(
            files,
            [
                "/cg/memory/memory.limit_in_bytes",
                "/cg/hugetlb,pids/pids.max"
            ]
        );
    }

    #[test]
    fn what_no_hierarchy_can_do_is_refused_by_its_field_and_an_empty_wish_is_granted() {
        let directories = [
            directory(Version::V1, &["memory"]),
            directory(Version::V2, &[]),
        ];
        for (json, field) in [
            (r#"{"pids":{"limit":7}}"#, "pids.limit"),
            (r#"{"cpu":{"cpus":"0"}}"#, "cpu.cpus"),
            (r#"{"network":{"classID":5}}"#, "network.classID"),
            (
                r#"{"network":{"priorities":[{"name":"eth0","priority":1}]}}"#,
                "network.priorities",
            ),
            (r#"{"rdma":{"mlx5_1":{"hcaHandles":3}}}"#, "rdma.mlx5_1"),
            (r#"{"rdma":{"mlx5_1":{}}}"#, "rdma.mlx5_1"),
            (r#"{"unified":{"memory.high":"5"}}"#, "unified.memory.high"),
            (r#"{"unified":{"../x.y":"5"}}"#, "unified.../x.y"),
            (
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":5}]}}"#,
                "blockIO.throttleReadBpsDevice",
            ),
        ] {
            let resources: LinuxResources = serde_json::from_str(json).unwrap();
            let text = plan(&directories, &resources).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("linux.resources.{field}")),
                "{json}: {text}"
            );
        }
        for json in [
            r#"{"cpu":{}}"#,
            r#"{"network":{}}"#,
            r#"{"blockIO":{}}"#,
            "{}",
        ] {
            let resources: LinuxResources = serde_json::from_str(json).unwrap();
            assert_eq!(plan(&directories, &resources).unwrap(), [], "{json}");
        }
    }

    #[test]
    fn no_pids_limit_is_less_than_zero() {
        for (limit, value) in [(5, "5"), (0, "1"), (-1, "max")] {
            let pids = LinuxPidsBuilder::default().limit(limit).build().unwrap();
            let settings = plan_pids(&directory(Version::V1, &["pids"]), &pids);
            assert_eq!(settings[0].value, value);
        }
    }

    #[test]
    fn only_the_controllers_of_fields_that_are_given_are_needed() {
        for (json, expected) in [
            (r#"{"cpu":{"quota":5000}}"#, vec![("cpu", "cpu.quota")]),
            (r#"{"cpu":{"shares":512}}"#, vec![("cpu", "cpu.shares")]),
            (r#"{"cpu":{"cpus":"0"}}"#, vec![("cpuset", "cpu.cpus")]),
            (
                r#"{"cpu":{"idle":1,"mems":"0"}}"#,
                vec![("cpu", "cpu.idle"), ("cpuset", "cpu.mems")],
            ),
            (
                r#"{"memory":{"limit":1}}"#,
                vec![("memory", "memory.limit")],
            ),
            (
                r#"{"blockIO":{"weight":10}}"#,
                vec![("io", "blockIO.weight")],
            ),
            (
                r#"{"unified":{"pids.max":"1"}}"#,
                vec![("pids", "unified.pids.max")],
            ),
            (
                r#"{"cpu":{},"memory":{},"blockIO":{},"network":{}}"#,
                vec![],
            ),
            ("{}", vec![]),
        ] {
            let resources: LinuxResources = serde_json::from_str(json).unwrap();
            let needed = controllers_needed(&resources);
            let needed: Vec<_> = needed
                .iter()
                .map(|need| (need.controller.as_str(), need.field.as_str()))
                .collect();
            assert_eq!(needed, expected, "{json}");
        }
    }

    #[test]
    fn each_line_of_a_raw_file_is_a_write_of_its_own() {
        let json = r#"{"unified":{"io.max":"8:0 rbps=1\n8:16 wbps=2\n"}}"#;
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        let settings = plan(&[directory(Version::V2, &["io"])], &resources).unwrap();
        let values: Vec<_> = settings.iter().map(|it| it.value.as_str()).collect();
        assert_eq!(values, ["8:0 rbps=1", "8:16 wbps=2"]);
    }

    #[test]
    fn raw_files_of_v2_are_written_in_the_order_of_their_names() {
        let files = ["memory.high", "cgroup.max.depth", "memory.min"];
        let unified: HashMap<_, _> = files
            .iter()
            .map(|&file| (file.to_owned(), "1".to_owned()))
            .collect();
        let resources = LinuxResourcesBuilder::default()
            .unified(unified)
            .build()
            .unwrap();
        let settings = plan(&[directory(Version::V2, &["memory"])], &resources).unwrap();
        let fields: Vec<_> = settings
            .iter()
            .map(|setting| setting.field.as_ref())
            .collect();
        assert_eq!(
            fields,
            [
                "unified.cgroup.max.depth",
                "unified.memory.high",
                "unified.memory.min"
            ]
        );
    }
}
