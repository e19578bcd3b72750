//! One list of plugins per phase, computed ahead.
