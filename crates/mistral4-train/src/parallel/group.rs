//! The communicator as the model sees it.

use mistral4::ops::Group;

use super::Communicator;

impl Group for Communicator {
    fn rank(&self) -> usize {
        self.rank()
    }

    fn size(&self) -> usize {
        self.size()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) {
        self.all_reduce_sum(values);
    }

    fn all_to_all(&self, send: &[u8], send_counts: &[usize], receive: &mut [u8], receive_counts: &[usize]) {
        receive.copy_from_slice(&self.all_to_all(send, send_counts, receive_counts));
    }
}
