//! Runs a plan: forwards, onwards after a stop, and back.
//!
//! Every step is noted as begun before anything is done for it and as done afterwards, durably. So after a kill at any
//! moment at most one step is in doubt, and it is known which. What a step makes is looked for before it is made
//! ([`Action::probe`]): what was there before the takeover is left alone when it is taken back.
//!
//! - [`engine`]: a run that has the lock, forwards and backwards
//! - [`resolve`]: the plan's steps for this point and these devices
//! - [`back`]: taking back without the plan, cleaning up, where a takeover stands

mod back;
mod engine;
mod resolve;

pub use back::{Standing, Undo, clean, standing, undo};
pub use engine::Moment;

use crate::bubble::{self, Bubble, Wishes};
use crate::plan::{Plan, Step};
use crate::proc;
use crate::report::{DryRun, Progress, Report, StepPlan};
use crate::state::{Device, Mode, Phase, State, Status, StepState, Store};
use crate::step::Action;
use crate::tools::Tools;
use back::undo_with;
use engine::{Engine, Trap};
use resolve::{actions, variables};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;
use varve_common::control::PointReply;
use varve_common::paths::Paths;
use varve_common::problem::{Problem, check_name};

/// What a plan is run for.
#[derive(Clone, Debug)]
pub struct Context {
    /// The group.
    pub group: String,
    /// The exact point.
    pub point: PointReply,
    /// Its volumes on this host, in the order of their numbers. In a test they must take writes that nobody keeps.
    pub devices: Vec<Device>,
    /// For real, or in a bubble.
    pub mode: Mode,
    /// Where everything is.
    pub paths: Paths,
    /// When the takeover began, for the measured recovery time; usually before the devices were there.
    pub began: SystemTime,
    /// Where the system's programs are.
    pub tools: Tools,
    /// What the operator is told to run.
    pub commands: Commands,
}

/// Commands to suggest.
#[derive(Clone, Debug)]
pub struct Commands {
    /// Goes on after a stop.
    pub resume: String,
    /// Takes everything back.
    pub undo: String,
    /// Takes back what a plan did, and leaves the takeover.
    pub undo_plan: String,
}

/// Runs one plan for one group.
pub struct Runner {
    context: Context,
    plan: Plan,
    /// What each step of the plan became.
    actions: Vec<Action>,
    variables: BTreeMap<String, String>,
    cancel: Arc<AtomicBool>,
    trap: Option<Trap>,
}

impl Runner {
    /// Puts the point and the devices into the plan. Nothing is touched.
    ///
    /// # Errors
    /// The plan does not fit the group's volumes.
    pub fn new(plan: Plan, context: Context) -> Result<Self, Problem> {
        check_name("group", &context.group)?;
        let volumes: Vec<String> = context.devices.iter().map(|device| device.volume.clone()).collect();
        if let Some(first) = plan.check(&volumes).into_iter().next() {
            return Err(first);
        }
        let actions = actions(&plan, &context)?;
        let variables = variables(&context);
        Ok(Self { context, plan, actions, variables, cancel: Arc::default(), trap: None })
    }

    /// Set to true, it stops the run at once (the step that is being done fails).
    pub fn canceller(&self) -> Arc<AtomicBool> {
        self.cancel.clone()
    }

    /// For tests.
    #[doc(hidden)]
    pub fn set_trap(&mut self, trap: impl Fn(usize, Moment) + 'static) {
        self.trap = Some(Box::new(trap));
    }

    /// What would happen, exactly, and what this host lacks for it. Nothing is touched.
    pub fn dry_run(&self) -> DryRun {
        let step = |(place, (step, action)): (usize, (&Step, &Action))| StepPlan {
            number: place + 1,
            name: step.name.clone(),
            kind: step.kind.word().to_owned(),
            timeout_seconds: step.timeout.as_secs_f64(),
            what: action.text(),
            undo: action.undo_text(),
            action: action.clone(),
        };
        DryRun {
            group: self.context.group.clone(),
            mode: self.context.mode,
            point: self.context.point.clone(),
            plan: self.plan.file.clone(),
            devices: self.context.devices.clone(),
            steps: self.plan.steps.iter().zip(&self.actions).enumerate().map(step).collect(),
            problems: self.plan.check_host(&self.context.tools),
        }
    }

    /// Does every step, in order, until one fails.
    ///
    /// # Errors
    /// It could not even begin: an earlier run of the group is not finished, or nothing can be noted. A step that fails
    /// is no error but a [`Report`] with [`Outcome::Stopped`].
    pub fn run(&self, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let (group, mode) = (&self.context.group, self.context.mode);
        let store = Store::open(&self.context.paths, group, mode)?;
        if let Some(state) = store.load()? {
            let test = if mode == Mode::Test { "a test of the " } else { "a " };
            let why = format!("{test}takeover that began at {} is still in place", state.began);
            let next = self.anew();
            return Err(Problem::refused(format!("the takeover plan of group '{group}' was not begun"), why, next));
        }
        let state = self.new_state();
        let mut engine = self.engine(store, state);
        engine.save()?;
        if mode == Mode::Test {
            engine.bubble = Some(self.make_bubble(&engine)?);
        }
        engine.forwards(progress)
    }

    /// Goes on where an earlier run stopped or was killed: steps that were done are looked at, and done again where what
    /// they made is gone (after a reboot); the one that was being done is done anew; then the rest.
    ///
    /// # Errors
    /// There is nothing to go on with, or steps that were done were changed in the plan since.
    pub fn resume(&self, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let (group, mode) = (&self.context.group, self.context.mode);
        let store = Store::open(&self.context.paths, group, mode)?;
        let what = format!("the takeover plan of group '{group}' cannot go on");
        let Some(old) = store.load()? else {
            let next = "begin it anew";
            return Err(Problem::not_found(what, "nothing of it is in place on this host", next));
        };
        if old.phase == Phase::Undoing {
            return Err(Problem::refused(what, "it is being taken back", self.anew()));
        }
        let state = self.merge(old).map_err(|why| {
            let next = format!("put the plan back as it was, or take it back first: '{}'", self.context.commands.undo);
            Problem::refused(what.clone(), why, next)
        })?;
        let mut engine = self.engine(store, state);
        if mode == Mode::Test {
            let Some(bubble) = Bubble::open(&self.dir()) else {
                let next = format!("'{}', then begin anew", self.context.commands.undo);
                return Err(Problem::refused(what, "the bubble of the test is gone", next));
            };
            engine.bubble = Some(bubble);
        }
        engine.state.phase = Phase::Running;
        engine.save()?;
        engine.forwards(progress)
    }

    /// Takes back what was done, the last step first. What cannot be taken back is named, and does not keep the rest
    /// from being taken back. A test's bubble is taken away with everything in it.
    ///
    /// # Errors
    /// It could not even begin. What could not be taken back is no error but a [`Report`] with
    /// [`Outcome::UndoIncomplete`].
    pub fn undo(&self, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let undoing = Undo {
            paths: self.context.paths.clone(),
            group: self.context.group.clone(),
            mode: self.context.mode,
            tools: self.context.tools.clone(),
            command: self.context.commands.undo.clone(),
        };
        // A run that the operator stopped can be taken back.
        self.cancel.store(false, Ordering::Relaxed);
        undo_with(&undoing, self.cancel.clone(), self.trap.as_ref(), progress)
    }

    /// How to begin anew when an earlier run is in the way. The takeover itself may be newer than that run: taking
    /// everything back would undo it as well.
    fn anew(&self) -> String {
        let Commands { resume, undo, undo_plan } = &self.context.commands;
        match self.context.mode {
            Mode::Live => format!("'{undo_plan}' takes that back, then '{resume}' runs the plan"),
            Mode::Test => format!("'{undo}' takes that back"),
        }
    }

    fn dir(&self) -> PathBuf {
        self.context.paths.takeover_bubble(&self.context.group)
    }

    fn engine(&self, store: Store, state: State) -> Engine<'_> {
        Engine {
            store,
            state,
            bubble: None,
            tools: &self.context.tools,
            cancel: &self.cancel,
            trap: self.trap.as_ref(),
            resume: &self.context.commands.resume,
            undo: &self.context.commands.undo,
        }
    }

    fn make_bubble(&self, engine: &Engine<'_>) -> Result<Bubble, Problem> {
        let dir = self.dir();
        let made = (|| {
            let ip = self.context.tools.find("ip").ok_or("there is no program ip (iproute2) on this host")?;
            bubble::destroy(&dir, &[])?;
            let (visible, own) = (self.context.paths.root(), self.context.paths.run_dir());
            let wishes = Wishes { private: &self.plan.private, visible, own: &own, ip: &ip };
            Bubble::create(&dir, &wishes)
        })();
        made.map_err(|why| {
            // Nothing was done in it: nothing is to be remembered.
            let _ = bubble::destroy(&dir, &[]);
            let _ = engine.store.forget();
            let what = format!("the bubble for a test of group '{}' cannot be made", self.context.group);
            Problem::failed(what, why, "see to that, then try again")
        })
    }

    fn new_state(&self) -> State {
        let began = jiff::Timestamp::try_from(self.context.began).unwrap_or_else(|_| jiff::Timestamp::now());
        State {
            version: State::VERSION,
            group: self.context.group.clone(),
            mode: self.context.mode,
            run: format!("{:032x}", rand::random::<u128>()),
            boot: proc::boot_id(),
            phase: Phase::Running,
            point: self.context.point.clone(),
            began: began.to_string(),
            plan: self.plan.file.clone(),
            devices: self.context.devices.clone(),
            variables: self.variables.clone(),
            steps: self.plan.steps.iter().zip(&self.actions).map(|(step, action)| new_step(step, action)).collect(),
        }
    }

    /// The state to go on with: what is new in the plan and in the devices, and what was done.
    fn merge(&self, old: State) -> Result<State, String> {
        let mut state = self.new_state();
        (state.run, state.began, state.boot) = (old.run, old.began, old.boot);
        for (place, old) in old.steps.into_iter().enumerate() {
            if matches!(old.status, Status::Pending) {
                continue;
            }
            match state.steps.get_mut(place) {
                // A step that failed may be corrected: what was begun of it is taken back as it was.
                Some(new) if new.written == old.written || (old.status == Status::Begun && new.kind == old.kind) => {
                    (new.status, new.boot) = (old.status, old.boot);
                    (new.found, new.made) = (old.found, old.made);
                    (new.outcome, new.seconds) = (old.outcome, old.seconds);
                    // Until it is done anew, what is there is what was done then.
                    new.wanted = Some(std::mem::replace(&mut new.action, old.action));
                }
                _ => return Err(format!("its step {} '{}' was done and has changed since", place + 1, old.name)),
            }
        }
        Ok(state)
    }
}

fn new_step(step: &Step, action: &Action) -> StepState {
    StepState {
        name: step.name.clone(),
        kind: step.kind.word().to_owned(),
        written: serde_json::to_value(step).unwrap_or_default(),
        action: action.clone(),
        wanted: None,
        timeout_ms: u64::try_from(step.timeout.as_millis()).unwrap_or(u64::MAX),
        status: Status::Pending,
        boot: String::new(),
        found: false,
        made: Vec::new(),
        outcome: None,
        seconds: 0.0,
    }
}
