//! On which memory nodes a process gets its memory (`linux.memoryPolicy`).

use oci_spec::runtime::{Linux, MemoryPolicyFlagType, MemoryPolicyModeType};

use super::PlanError;
use super::process::members;

/// `MAX_NUMNODES` of the largest kernels (`CONFIG_NODES_SHIFT` 10).
const NODES_MAX: usize = 1024;

/// The arguments of set_mempolicy(2).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct MemoryPolicy {
    /// `MPOL_*` with flags.
    pub(crate) mode: i32,
    /// A bit for each node.
    pub(crate) nodes: Vec<u64>,
}

pub(crate) fn plan(linux: &Linux) -> Result<Option<MemoryPolicy>, PlanError> {
    let Some(policy) = linux.memory_policy() else {
        return Ok(None);
    };
    let field = "linux.memoryPolicy.nodes";
    let list = policy.nodes().as_deref().unwrap_or_default();
    let nodes = if list.is_empty() {
        Vec::new()
    } else {
        members(list, NODES_MAX).ok_or_else(|| {
            let reason = format!(
                "invalid memory policy nodes: `{list}` is no list of memory nodes below {NODES_MAX}"
            );
            PlanError::invalid(field, reason)
        })?
    };
    let everywhere = matches!(
        policy.mode(),
        MemoryPolicyModeType::MpolDefault | MemoryPolicyModeType::MpolLocal
    );
    if everywhere && !nodes.is_empty() {
        let reason = format!(
            "set_mempolicy(2) calls it an invalid argument: {} takes no nodes",
            policy.mode()
        );
        return Err(PlanError::invalid(field, reason));
    }
    // MPOL_PREFERRED without nodes prefers the local one.
    let preferred = policy.mode() == MemoryPolicyModeType::MpolPreferred;
    if !everywhere && !preferred && nodes.is_empty() {
        let reason = format!("{} needs nodes, as 0-1", policy.mode());
        return Err(PlanError::invalid(field, reason));
    }
    let flags = policy.flags().iter().flatten().map(flag);
    let mode = flags.fold(mode(policy.mode()), |mode, flag| mode | flag);
    let mut bits = vec![0; nodes.iter().max().map_or(0, |last| last / 64 + 1)];
    for node in nodes {
        bits[node / 64] |= 1 << (node % 64);
    }
    Ok(Some(MemoryPolicy { mode, nodes: bits }))
}

/// The numbers of <linux/mempolicy.h>.
fn mode(mode: MemoryPolicyModeType) -> i32 {
    match mode {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    }
}

fn flag(flag: &MemoryPolicyFlagType) -> i32 {
    match flag {
        MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
        MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
        MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_plan(policy: &str) -> Result<Option<MemoryPolicy>, PlanError> {
        plan(&serde_json::from_str(&format!(r#"{{"memoryPolicy":{policy}}}"#)).unwrap())
    }

    #[test]
    fn nodes_become_bits_and_flags_join_the_mode() {
        let policy = r#"{"mode":"MPOL_BIND","nodes":"0,64-65","flags":["MPOL_F_STATIC_NODES"]}"#;
        let expected = MemoryPolicy {
            mode: 2 | 1 << 15,
            nodes: vec![1, 3],
        };
        assert_eq!(try_plan(policy).unwrap(), Some(expected));
    }

    #[test]
    fn nodes_are_needed_where_the_mode_needs_them() {
        for (policy, words) in [
            (r#"{"mode":"MPOL_BIND"}"#, "needs nodes"),
            (r#"{"mode":"MPOL_LOCAL","nodes":"0"}"#, "takes no nodes"),
            (r#"{"mode":"MPOL_BIND","nodes":"a"}"#, "is no list"),
            (r#"{"mode":"MPOL_BIND","nodes":"0-99999999"}"#, "is no list"),
        ] {
            let error = try_plan(policy).unwrap_err().to_string();
            assert!(error.contains(words), "{policy}: {error}");
        }
        try_plan(r#"{"mode":"MPOL_PREFERRED"}"#).unwrap();
    }
}
