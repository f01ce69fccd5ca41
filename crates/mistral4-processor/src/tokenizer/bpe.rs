//! Byte-pair encoding: a pattern cuts the text into pieces, merges join each piece's bytes into tokens.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use super::pattern::Pattern;
use crate::Result;

/// Which adjacent tokens join, and in which order.
#[derive(Debug)]
pub(crate) enum Merges {
    /// Any two whose joined bytes are a token, lowest id first (tekken, tiktoken).
    ByRank,
    /// Listed pairs, earliest first (`tokenizer.json`).
    Listed {
        /// `(left, right)` to `(place in the list, joined token)`.
        pairs: FxHashMap<(u32, u32), (u32, u32)>,
        /// Whether a piece that is a token as a whole is taken without merging.
        ignore_merges: bool,
    },
}

/// A byte-level BPE model.
#[derive(Debug)]
pub(crate) struct Bpe {
    pattern: Option<Pattern>,
    ids: FxHashMap<Box<[u8]>, u32>,
    byte_ids: [u32; 256],
    merges: Merges,
}

impl Bpe {
    /// Builds the model; `Err` holds a byte that is no token.
    pub(crate) fn new(
        pattern: Option<Pattern>,
        ids: FxHashMap<Box<[u8]>, u32>,
        merges: Merges,
    ) -> std::result::Result<Self, u8> {
        let mut byte_ids = [0; 256];
        for byte in 0..=255_u8 {
            byte_ids[usize::from(byte)] = *ids.get(&[byte][..]).ok_or(byte)?;
        }
        Ok(Self { pattern, ids, byte_ids, merges })
    }

    /// Appends the ids of a text.
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut merger = Merger::default();
        // Text that no alternative of a tekken pattern matches is dropped, as tiktoken drops it.
        let keep_gaps = matches!(self.merges, Merges::Listed { .. });
        let mut encode = |piece: &str| self.encode_piece(piece.as_bytes(), &mut merger, out);
        match &self.pattern {
            Some(pattern) => pattern.for_each_piece(text, keep_gaps, encode),
            None => {
                encode(text);
                Ok(())
            }
        }
    }

    fn encode_piece(&self, piece: &[u8], merger: &mut Merger, out: &mut Vec<u32>) {
        match piece {
            [] => return,
            [byte] => return out.push(self.byte_ids[usize::from(*byte)]),
            _ => {}
        }
        let whole = !matches!(self.merges, Merges::Listed { ignore_merges: false, .. });
        match self.ids.get(piece) {
            Some(id) if whole => out.push(*id),
            _ => merger.run(self, piece, out),
        }
    }

    /// The merge of two neighbours that meet at `mid`, as (priority, joined id).
    fn join(&self, piece: &[u8], span: (u32, u32), pair: (u32, u32)) -> Option<(u32, u32)> {
        match &self.merges {
            Merges::ByRank => self.ids.get(&piece[span.0 as usize..span.1 as usize]).map(|id| (*id, *id)),
            Merges::Listed { pairs, .. } => pairs.get(&pair).copied(),
        }
    }
}

/// A merge that may have been overtaken: it holds only while both its neighbours still have these bounds.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    start: u32,
    mid: u32,
    end: u32,
    id: u32,
}

/// The working memory of the merge loop, kept between pieces.
#[derive(Default)]
struct Merger {
    /// For a token that starts here, its end; 0 where no token starts.
    end: Vec<u32>,
    /// For a token that ends here, its start.
    start: Vec<u32>,
    /// For a token that starts here, its id.
    id: Vec<u32>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    fn run(&mut self, bpe: &Bpe, piece: &[u8], out: &mut Vec<u32>) {
        let length = u32::try_from(piece.len()).expect("a piece of text is shorter than 4 GiB");
        self.end.clear();
        self.end.extend(1..=length);
        self.start.clear();
        self.start.extend((0..=length).map(|end| end.saturating_sub(1)));
        self.id.clear();
        self.id.extend(piece.iter().map(|byte| bpe.byte_ids[usize::from(*byte)]));
        self.queue.clear();
        for start in 0..length - 1 {
            self.offer(bpe, piece, start);
        }
        while let Some(Reverse(next)) = self.queue.pop() {
            let (start, mid) = (next.start as usize, next.mid as usize);
            if self.end[start] != next.mid || self.end[mid] != next.end {
                continue;
            }
            self.end[start] = next.end;
            self.end[mid] = 0;
            self.start[next.end as usize] = next.start;
            self.id[start] = next.id;
            self.offer(bpe, piece, next.start);
            if next.start > 0 {
                self.offer(bpe, piece, self.start[start]);
            }
        }
        let mut at = 0;
        while at < length {
            out.push(self.id[at as usize]);
            at = self.end[at as usize];
        }
    }

    /// Queues the merge of the token at `start` with its right neighbour, if there is one.
    fn offer(&mut self, bpe: &Bpe, piece: &[u8], start: u32) {
        let mid = self.end[start as usize];
        if mid as usize >= piece.len() {
            return;
        }
        let end = self.end[mid as usize];
        let pair = (self.id[start as usize], self.id[mid as usize]);
        if let Some((priority, id)) = bpe.join(piece, (start, end), pair) {
            self.queue.push(Reverse(Candidate { priority, start, mid, end, id }));
        }
    }
}
