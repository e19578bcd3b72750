//! shdict
