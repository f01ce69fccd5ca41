//! Training on many ranks.

pub mod communicator;
pub mod lane;
pub mod mesh;
pub mod reduce;
pub mod sharding;
pub mod stop;

pub use communicator::Communicator;
pub use lane::{Lane, Pending};
pub use mesh::{Mesh, MeshShape};
pub use sharding::{ShardedGradients, ShardedStore, Sharding};
