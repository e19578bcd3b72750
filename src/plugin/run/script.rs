//! The scripts of locations: compiled once per VM, run phase by phase as lua-nginx-module runs them.

use std::{cell::RefCell, collections::HashMap, ffi::c_int, rc::Rc, sync::Arc};

use mlua::ffi;

use super::{Flow, Generation, Job, Run, Runner, failed, run_of, settle};
use crate::{
    conf::locations::{Location, Script, SetByLua, Source},
    error::{Error, Kind, Result},
    exchange::{Exchange, Phase},
    lua::{
        Stack, api,
        sched::{self, Outcome},
        vm,
    },
    observe::log::Level,
    plugin::PhaseMask,
};

/// Registry references of the scripts that have run.
#[derive(Default)]
pub(super) struct Compiled {
    /// By address. Bounded by what config.yaml says; the scripts are held so that no other gets their address.
    scripts: RefCell<HashMap<usize, (Arc<Script>, c_int)>>,
    /// By path, where the path holds variables.
    files: RefCell<HashMap<Box<str>, c_int>>,
}

/// Files with variables in their names that are kept compiled: the client may have a say in the names.
const MAX_FILES: usize = 1000;

/// The status of a response that a body filter cuts off: nginx's for a connection that is closed without an answer.
const CUT_OFF: u16 = 444;

/// Why a script does not run, and what nginx answers then.
struct NotLoaded {
    text: String,
    status: u16,
}

impl From<String> for NotLoaded {
    fn from(text: String) -> Self {
        NotLoaded { text, status: 500 }
    }
}

impl Compiled {
    /// How many scripts are kept.
    pub fn len(&self) -> usize {
        self.scripts.borrow().len() + self.files.borrow().len()
    }
}

impl Generation {
    fn script(&self, script: &Arc<Script>) -> Result<c_int, NotLoaded> {
        let key = Arc::as_ptr(script) as usize;
        if let Some((_, anchor)) = self.scripts.scripts.borrow().get(&key) {
            return Ok(*anchor);
        }
        let anchor = self.compile(script)?;
        self.scripts.scripts.borrow_mut().insert(key, (script.clone(), anchor));
        Ok(anchor)
    }

    fn file(&self, path: &str) -> Result<c_int, NotLoaded> {
        if let Some(anchor) = self.scripts.files.borrow().get(path) {
            return Ok(*anchor);
        }
        let path_of = self.vm.config.prefix.join(path);
        let name = format!("@{}", path_of.display()).into();
        let anchor = self.compile(&Script { source: Source::File(path_of), name })?;
        let mut files = self.scripts.files.borrow_mut();
        if files.len() >= MAX_FILES {
            files.drain().for_each(|(_, anchor)| self.vm.release(anchor));
        }
        files.insert(path.into(), anchor);
        Ok(anchor)
    }

    fn compile(&self, script: &Script) -> Result<c_int, NotLoaded> {
        if let Source::File(path) = &script.source
            && let Err(e) = std::fs::File::open(path)
        {
            let status = match e.kind() {
                std::io::ErrorKind::NotFound => 404,
                std::io::ErrorKind::PermissionDenied => 503,
                _ => 500,
            };
            let path = path.display();
            return Err(NotLoaded {
                text: format!("failed to load external Lua file \"{path}\": cannot open {path}: {e}"),
                status,
            });
        }
        let chunk = vm::load_script(&self.vm.lua, script)?;
        Ok(self.vm.keep(chunk).map_err(|e| e.to_string())?)
    }
}

impl Runner {
    /// Makes `location` the one that serves the request.
    pub fn enter_location(&self, x: &mut Exchange, location: Arc<Location>) {
        let mut mask = PhaseMask::default();
        for (script, phase) in [
            (&location.header_filter, Phase::HeaderFilter),
            (&location.body_filter, Phase::BodyFilter),
            (&location.log, Phase::Log),
        ] {
            if script.is_some() {
                mask.add(phase);
            }
        }
        if x.snapshot.version != self.snapshot.get() {
            self.follow(&x.snapshot);
        }
        x.lua.phases = mask.0;
        x.location = Some(location);
        if x.lua.run.is_none() {
            let generation = self.generation_for(x);
            let slot = generation.vm.take_slot();
            x.lua.slot = Some(slot);
            match (x.lua.ctx.take(), &x.conn.ctx) {
                (Some(ctx), _) => generation.vm.adopt_ctx(slot, &*ctx),
                (None, Some(ctx)) => generation.vm.inherit_ctx(slot, &**ctx),
                (None, None) => {}
            }
            x.lua.run = Some(Rc::new(Run::new(Job::Location(generation), slot)));
        }
    }

    /// The worker's VM; with `lua_code_cache off` one that was made for the request, so that every change of a file counts.
    fn generation_for(&self, x: &Exchange) -> Rc<Generation> {
        let shared = self.generation.borrow().clone();
        if x.location.as_ref().is_none_or(|l| l.directives.lua_code_cache) {
            return shared;
        }
        match Generation::bare(&self.setup, self.worker, &x.snapshot, &self.groups) {
            Ok(own) => {
                self.others.plugins(&own);
                own
            }
            Err(e) => {
                x.log(Level::Error, format!("failed to initialize Lua VM: {e}").as_bytes());
                shared
            }
        }
    }

    /// Forgets `ngx.ctx` and whatever else of the request its scripts kept: an internal redirect starts anew.
    pub fn forget_location(&self, x: &mut Exchange) {
        x.lua.run = None;
        x.lua.slot = None;
        x.lua.phases = 0;
        x.location = None;
    }

    /// Runs a script that may answer.
    pub async fn script(&self, x: &mut Exchange, script: &Arc<Script>, phase: Phase) -> Flow {
        x.phase = phase;
        match self.run_script(x, script).await {
            Ok(Outcome::Failed(text)) => {
                x.log(Level::Error, format!("lua entry thread aborted: runtime error: {text}").as_bytes());
                failed(x)
            }
            Ok(_) if x.jump.is_some() => Flow::Jump,
            // ngx.DECLINED: somebody else is to answer, and in the content phase nobody is left. ngx.ERROR: nobody is to.
            Ok(Outcome::Exit(-5)) if phase != Phase::Content => Flow::Declined,
            Ok(Outcome::Exit(-5 | -1)) => Flow::Close,
            // The client went away: there is nobody to answer.
            Ok(Outcome::Exit(499)) => {
                x.response.status = 499;
                Flow::Close
            }
            Ok(Outcome::Exit(n)) => settle(x, Outcome::Exit(n)),
            Ok(Outcome::Done(_)) => settle(x, Outcome::Done(None)),
            Err(NotLoaded { text, status }) => {
                x.log(Level::Error, text.as_bytes());
                failed(x);
                x.response.status = status;
                Flow::Answer
            }
        }
    }

    /// `set_by_lua`: the value for the variable.
    pub async fn set_by_lua(&self, x: &mut Exchange, set: &SetByLua) -> Result<Vec<u8>> {
        x.phase = Phase::Set;
        let told = |x: &Exchange, text: String| {
            x.log(Level::Error, text.as_bytes());
            Error::script(text)
        };
        let (generation, anchor) = self.prepared(x, &set.script).map_err(|e| told(x, e.text))?;
        let args: Vec<Vec<u8>> = set
            .args
            .iter()
            .map(|arg| {
                let mut value = Vec::new();
                x.fill(arg, &mut value);
                value
            })
            .collect();
        let n = args.len();
        x.lua.set_args.clone_from(&args);
        // The chunk's arguments are the same.
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, anchor as usize);
            s.reserve(n).map_or(0, |()| {
                for arg in &args {
                    s.push_bytes(arg);
                }
                n as c_int
            })
        };
        let read = |s: &Stack| s.bytes(1).unwrap_or_default().to_vec();
        match sched::call(&generation.vm, x, push, read).await {
            Outcome::Done(value) => Ok(value),
            Outcome::Exit(_) => Ok(Vec::new()),
            Outcome::Failed(text) => Err(told(x, format!("failed to run set_by_lua*: {text}"))),
        }
    }

    /// Runs a script of a handshake, whose exchange has no request. An error ends the handshake; it is logged here.
    pub async fn handshake(&self, x: &mut Exchange, script: &Arc<Script>, phase: Phase) -> Result<()> {
        if x.lua.run.is_none() {
            if x.snapshot.version != self.snapshot.get() {
                self.follow(&x.snapshot);
            }
            // Here, since a handshake may end in any place.
            self.check_memory();
            let generation = self.generation.borrow().clone();
            let slot = generation.vm.take_slot();
            if let Some(ctx) = x.lua.ctx.take() {
                generation.vm.inherit_ctx(slot, &*ctx);
            }
            x.lua.slot = Some(slot);
            x.lua.run = Some(Rc::new(Run::new(Job::Location(generation), slot)));
        }
        x.phase = phase;
        let ended = match self.run_script(x, script).await {
            Ok(Outcome::Failed(text)) => format!("lua entry thread aborted: runtime error: {text}"),
            Ok(Outcome::Exit(code)) if code == -1 || code >= 300 => {
                let text = format!("{}: lua exit with code {code}", api::context_name(phase));
                x.log(Level::Info, text.as_bytes());
                return Err(over(phase));
            }
            Ok(_) => return Ok(()),
            Err(NotLoaded { text, .. }) => text,
        };
        x.log(Level::Error, ended.as_bytes());
        Err(over(phase))
    }

    /// Ends the scripts of a handshake. What they have left in `ngx.ctx` stands in `x.lua.ctx` then.
    pub fn end_handshake(&self, x: &mut Exchange) {
        if let (Some(run), Some(slot)) = (run_of(x), x.lua.slot) {
            x.lua.ctx = run.generation().vm.kept_ctx(slot);
        }
        x.lua.run = None;
        x.lua.slot = None;
    }

    /// `balancer_by_lua`, before a try at the upstream. A status: the script has ended the request with it.
    pub async fn balancer(&self, x: &mut Exchange, script: &Arc<Script>) -> Result<Option<u16>> {
        x.phase = Phase::Balancer;
        match self.run_script(x, script).await {
            Ok(Outcome::Done(_) | Outcome::Exit(0)) => Ok(None),
            Ok(Outcome::Exit(status @ 200..=999)) => Ok(Some(status as u16)),
            Ok(Outcome::Exit(n)) => {
                Err(Error::script(format!("balancer_by_lua* has ended the request with ngx.exit({n})")))
            }
            Ok(Outcome::Failed(text)) => Err(Error::script(format!("failed to run balancer_by_lua*: {text}"))),
            Err(NotLoaded { text, .. }) => Err(Error::script(text)),
        }
    }

    /// Reads the request's body before anything else has it: `lua_need_request_body`, `balancer_by_lua`.
    pub async fn read_body(&self, x: &mut Exchange) -> Result<()> {
        crate::lua::ngx::req::read_all(x).await
    }

    /// Reads the rest of a body that starts with `begun`: what an upstream was given before it failed.
    pub async fn read_rest(&self, x: &mut Exchange, begun: Vec<u8>) -> Result<()> {
        crate::lua::ngx::req::read_rest(x, begun).await
    }

    /// Runs a script that works on the response.
    pub(super) async fn location_filter(&self, x: &mut Exchange, phase: Phase) -> Result<()> {
        let Some(script) = location_script(x, phase) else { return Ok(()) };
        x.phase = phase;
        match self.run_script(x, &script).await {
            Ok(Outcome::Failed(text)) => {
                let text = format!("failed to run {}: {text}", api::context_name(phase));
                x.log(Level::Error, text.as_bytes());
                Err(Error::script(text).told())
            }
            Ok(Outcome::Exit(n)) if phase == Phase::HeaderFilter && n >= 200 => {
                x.filter_exit = Some(n as u16);
                Err(Error::script("the header filter has ended the response"))
            }
            // `return ngx.ERROR`: nginx cuts the response off.
            Ok(Outcome::Done(Some(n))) if phase == Phase::BodyFilter && (n == -1.0 || n >= 300.0) => {
                x.filter_exit = Some(CUT_OFF);
                Err(Error::script("the body filter has ended the response"))
            }
            Ok(_) => Ok(()),
            Err(NotLoaded { text, .. }) => {
                x.log(Level::Error, text.as_bytes());
                Err(Error::script(text).told())
            }
        }
    }

    /// The number that the script returns, if it does.
    async fn run_script(&self, x: &mut Exchange, script: &Arc<Script>) -> Result<Outcome<Option<f64>>, NotLoaded> {
        let (generation, anchor) = self.prepared(x, script)?;
        let push = |s: &Stack| {
            s.get_index(ffi::LUA_REGISTRYINDEX, anchor as usize);
            0
        };
        Ok(sched::call(&generation.vm, x, push, |s| s.number(1)).await)
    }

    /// The VM of the request and the script compiled in it.
    fn prepared(&self, x: &Exchange, script: &Arc<Script>) -> Result<(Rc<Generation>, c_int), NotLoaded> {
        let run = run_of(x).ok_or_else(|| NotLoaded::from("the request has entered no location".to_owned()))?;
        let generation = run.generation();
        let anchor = match &script.source {
            Source::Varying(path) => {
                let mut name = Vec::new();
                x.fill(path, &mut name);
                generation.file(&String::from_utf8_lossy(&name))?
            }
            Source::Inline(_) | Source::File(_) => generation.script(script)?,
        };
        Ok((generation, anchor))
    }
}

fn over(phase: Phase) -> Error {
    Error::client(Kind::Tls).context(format!("{} has ended the handshake", api::context_name(phase)))
}

fn location_script(x: &Exchange, phase: Phase) -> Option<Arc<Script>> {
    let location = x.location.as_ref()?;
    match phase {
        Phase::HeaderFilter => location.header_filter.clone(),
        Phase::BodyFilter => location.body_filter.clone(),
        Phase::Log => location.log.clone(),
        _ => None,
    }
}
