//! Groups of ranks that differ for experts and for everything else.

use super::Communicator;

/// Whether a parameter belongs to the routed experts, which expert parallelism spreads over ranks that share all others.
pub fn is_expert(key: &str) -> bool {
    key.contains(".mlp.experts.")
}

/// The ranks that do something together with a parameter.
#[derive(Debug, Clone)]
pub struct KeyGroups {
    /// Those of parameters beside the experts.
    pub others: Communicator,
    /// Those of experts; `None`: the same.
    pub experts: Option<Communicator>,
}

impl KeyGroups {
    /// The group of a parameter.
    pub fn of(&self, key: &str) -> &Communicator {
        self.experts.as_ref().filter(|_| is_expert(key)).unwrap_or(&self.others)
    }

    /// Divides things by the group of their key.
    pub fn divide<T>(&self, things: Vec<T>, key: impl Fn(&T) -> &str) -> Vec<(&Communicator, Vec<T>)> {
        let Some(experts) = &self.experts else { return vec![(&self.others, things)] };
        let (expert, other) = things.into_iter().partition(|thing| is_expert(key(thing)));
        vec![(&self.others, other), (experts, expert)]
    }

    /// The same groups with messages of their own, for another thread; collective.
    pub fn duplicate(&self) -> Self {
        Self { others: self.others.duplicate(), experts: self.experts.as_ref().map(Communicator::duplicate) }
    }
}
