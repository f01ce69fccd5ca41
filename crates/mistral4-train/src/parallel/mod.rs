//! Training on many ranks.

pub mod communicator;
mod group;
pub mod groups;
pub mod holdings;
pub mod lane;
pub mod layout;
pub mod mesh;
pub mod pipeline;
pub mod reduce;
pub mod sharding;
pub mod stop;

pub use communicator::Communicator;
pub use groups::KeyGroups;
pub use holdings::Holdings;
pub use lane::{Lane, Pending};
pub use layout::ModelLayout;
pub use mesh::{Mesh, MeshShape};
pub use pipeline::Pipeline;
pub use sharding::{ShardedGradients, ShardedStore, Sharding, ShardingPolicy};
