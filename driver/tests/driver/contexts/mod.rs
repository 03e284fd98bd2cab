//! The draft extension: page tables, and contexts over the model.

mod tables;
