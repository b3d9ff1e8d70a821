//! The negotiation: options and their answers. Pure: bytes in, bytes and a decision out.
//!
//! ```text
//! greeting ─► client flags ─► option* ─► Step::Begin   the transmission phase
//!                               │    └─► Step::Close
//!                               └─► Step::StartTls ─► a new Negotiation (nothing from before TLS counts) ─► option*
//! ```

use super::wire::*;
use crate::limits::{
    NBD_INFO_REQUESTS_MAX, NBD_OPTION_BYTES_MAX, NBD_OPTION_SKIP_MAX, NBD_QUERIES_MAX, NBD_REQUEST_BYTES_MAX,
    NBD_STRING_BYTES_MAX,
};

/// Bytes of [`greeting`].
pub const GREETING_BYTES: usize = 18;
/// Bytes before an option's data.
pub const OPTION_HEADER_BYTES: usize = 16;

/// What the server says first.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    out
}

/// What is told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name; a client may have asked for the default by an empty one.
    pub name: String,
    /// For the operator.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The exports, as the negotiation needs them.
pub trait Catalog {
    /// The export of that name; the empty name is the default export.
    fn find(&self, name: &str) -> Option<Facts>;
    /// All of them.
    fn list(&self) -> Vec<Facts>;
}

/// Whether TLS is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Not offered: a Unix socket.
    None,
    /// It must come first.
    Required,
    /// It is there.
    Active,
}

/// What was agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Name of the export.
    pub export: String,
    /// Replies in chunks.
    pub structured: bool,
    /// `base:allocation` was chosen.
    pub allocation: bool,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the answer, read the next option.
    Next,
    /// Send the answer, turn to TLS, read the next option.
    StartTls,
    /// Send the answer, begin with requests.
    Begin(Agreed),
    /// Send the answer, close.
    Close,
}

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which.
    pub option: u32,
    /// Bytes of its data.
    pub len: u32,
}

impl OptionHeader {
    /// Decodes it.
    ///
    /// # Errors
    /// A wrong magic, or so much data that even reading over it is refused.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        match reader.u64()? {
            OPTION_MAGIC => {}
            other => return Err(WireError::Magic(other)),
        }
        let header = Self { option: reader.u32()?, len: reader.u32()? };
        if header.len > NBD_OPTION_SKIP_MAX {
            return Err(WireError::TooLong(u64::from(header.len)));
        }
        Ok(header)
    }

    /// Whether its data is to be read over, and the option answered by [`Negotiation::too_big`].
    pub fn is_too_big(self) -> bool {
        self.len > NBD_OPTION_BYTES_MAX
    }
}

/// One negotiation.
#[derive(Clone, Debug)]
pub struct Negotiation {
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// The export that `base:allocation` was chosen for.
    allocation_of: Option<String>,
}

/// An answer that is an error, with a text for people.
type Refusal = (u32, String);

impl Negotiation {
    /// Begins with the client's flags, which follow the greeting.
    ///
    /// # Errors
    /// A flag that was not offered.
    pub fn new(tls: Tls, client_flags: u32) -> Result<Self, WireError> {
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if client_flags & !known != 0 {
            return Err(WireError::Flags(client_flags));
        }
        let no_zeroes = client_flags & u32::from(FLAG_NO_ZEROES) != 0;
        Ok(Self { tls, no_zeroes, structured: false, allocation_of: None })
    }

    /// Goes on behind TLS: whatever was said before may have been said by somebody between.
    #[must_use]
    pub fn behind_tls(&self) -> Self {
        Self { tls: Tls::Active, no_zeroes: self.no_zeroes, structured: false, allocation_of: None }
    }

    /// Answers an option whose data was read over.
    pub fn too_big(&self, option: u32, out: &mut Vec<u8>) -> Step {
        if option == OPT_EXPORT_NAME {
            return Step::Close;
        }
        refuse(out, option, &(REP_ERR_TOO_BIG, format!("more than {NBD_OPTION_BYTES_MAX} bytes of data")));
        Step::Next
    }

    /// Answers an option; the answer is appended to `out`. A malformed one is refused with an answer.
    pub fn option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        let answer = match option {
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Step::Close;
            }
            OPT_STARTTLS => self.start_tls(data),
            OPT_EXPORT_NAME if self.tls == Tls::Required => return Step::Close,
            _ if self.tls == Tls::Required => {
                Err((REP_ERR_TLS_REQD, "this server speaks TLS only; begin with STARTTLS".to_owned()))
            }
            OPT_EXPORT_NAME => return self.export_name(data, catalog, out),
            OPT_INFO | OPT_GO => self.info(option, data, catalog, out),
            OPT_LIST => list(data, catalog, out),
            OPT_STRUCTURED_REPLY => nothing(data).map(|()| {
                self.structured = true;
                Step::Next
            }),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta(option, data, catalog, out),
            _ => Err((REP_ERR_UNSUP, format!("option {option} is not supported"))),
        };
        match answer {
            Ok(step) => {
                reply(out, option, REP_ACK, &[]);
                step
            }
            Err(refusal) => {
                refuse(out, option, &refusal);
                Step::Next
            }
        }
    }

    fn start_tls(&self, data: &[u8]) -> Result<Step, Refusal> {
        nothing(data)?;
        match self.tls {
            Tls::None => Err((REP_ERR_UNSUP, "there is no TLS on this socket".to_owned())),
            Tls::Active => Err((REP_ERR_INVALID, "TLS is there already".to_owned())),
            Tls::Required => Ok(Step::StartTls),
        }
    }

    fn export_name(&self, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        // This option has no answer that refuses.
        let name = std::str::from_utf8(data).ok().filter(|name| name.len() <= NBD_STRING_BYTES_MAX);
        let Some(facts) = name.and_then(|name| catalog.find(name)) else { return Step::Close };
        out.extend(facts.size.to_be_bytes());
        out.extend(self.transmission_flags(&facts).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Step::Begin(self.agreed(facts))
    }

    fn info(&self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Refusal> {
        let (name, wanted) = info_request(data).map_err(malformed)?;
        let facts = catalog.find(name).ok_or_else(|| unknown(name))?;
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend(facts.size.to_be_bytes());
        info.extend(self.transmission_flags(&facts).to_be_bytes());
        reply(out, option, REP_INFO, &info);
        let mut text = |kind: u16, text: &str| {
            if wanted.contains(&kind) {
                reply(out, option, REP_INFO, &[&kind.to_be_bytes(), text.as_bytes()].concat());
            }
        };
        text(INFO_NAME, &facts.name);
        text(INFO_DESCRIPTION, &facts.description);
        // Told without being asked for: a client that knows it splits what is too large.
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, 4096, NBD_REQUEST_BYTES_MAX] {
            sizes.extend(size.to_be_bytes());
        }
        reply(out, option, REP_INFO, &sizes);
        Ok(if option == OPT_GO { Step::Begin(self.agreed(facts)) } else { Step::Next })
    }

    fn meta(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Refusal> {
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            // One that fails takes away what an earlier one chose.
            self.allocation_of = None;
        }
        if !self.structured {
            return Err((REP_ERR_INVALID, "structured replies first".to_owned()));
        }
        let (name, queries) = meta_request(data).map_err(malformed)?;
        let facts = catalog.find(name).ok_or_else(|| unknown(name))?;
        let wanted = |query: &&str| *query == BASE_ALLOCATION || (!set && *query == "base:");
        if queries.iter().any(wanted) || (!set && queries.is_empty()) {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            reply(out, option, REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat());
            if set {
                self.allocation_of = Some(facts.name);
            }
        }
        Ok(Step::Next)
    }

    fn transmission_flags(&self, facts: &Facts) -> u16 {
        let mut flags = TRANSMIT_HAS_FLAGS | TRANSMIT_MULTI_CONN | TRANSMIT_CACHE | TRANSMIT_FLUSH | TRANSMIT_FUA;
        flags |= if facts.read_only {
            TRANSMIT_READ_ONLY
        } else {
            TRANSMIT_TRIM | TRANSMIT_WRITE_ZEROES | TRANSMIT_FAST_ZERO
        };
        if self.structured { flags | TRANSMIT_DF } else { flags }
    }

    fn agreed(&self, facts: Facts) -> Agreed {
        let allocation = self.allocation_of.as_deref() == Some(&facts.name);
        Agreed { export: facts.name, structured: self.structured, allocation }
    }
}

fn info_request(data: &[u8]) -> Result<(&str, Vec<u16>), WireError> {
    let mut reader = Reader::new(data);
    let name = reader.string(NBD_STRING_BYTES_MAX)?;
    let count = reader.u16()?;
    if count > NBD_INFO_REQUESTS_MAX {
        return Err(WireError::TooLong(u64::from(count)));
    }
    let wanted = (0..count).map(|_| reader.u16()).collect::<Result<Vec<_>, _>>()?;
    reader.end()?;
    Ok((name, wanted))
}

fn meta_request(data: &[u8]) -> Result<(&str, Vec<&str>), WireError> {
    let mut reader = Reader::new(data);
    let name = reader.string(NBD_STRING_BYTES_MAX)?;
    let count = reader.u32()?;
    if count > NBD_QUERIES_MAX {
        return Err(WireError::TooLong(u64::from(count)));
    }
    let queries = (0..count).map(|_| reader.string(NBD_STRING_BYTES_MAX)).collect::<Result<Vec<_>, _>>()?;
    reader.end()?;
    Ok((name, queries))
}

fn list(data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Refusal> {
    nothing(data)?;
    for facts in catalog.list() {
        let (name, text) = (facts.name.as_bytes(), facts.description.as_bytes());
        reply(out, OPT_LIST, REP_SERVER, &[&(name.len() as u32).to_be_bytes(), name, text].concat());
    }
    Ok(Step::Next)
}

fn nothing(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() { Ok(()) } else { Err((REP_ERR_INVALID, "this option has no data".to_owned())) }
}

fn malformed(e: WireError) -> Refusal {
    (REP_ERR_INVALID, format!("the option's data is malformed: {e}"))
}

fn unknown(name: &str) -> Refusal {
    // Not the whole of what may be 4096 bytes of anything.
    let short: String = name.chars().take(64).collect();
    (REP_ERR_UNKNOWN, format!("there is no export {short:?}"))
}

fn refuse(out: &mut Vec<u8>, option: u32, (kind, text): &Refusal) {
    reply(out, option, *kind, text.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    for number in [option, kind, data.len() as u32] {
        out.extend(number.to_be_bytes());
    }
    out.extend(data);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "negotiation_tests.rs"]
mod tests;
