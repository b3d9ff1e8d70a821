//! Runs a plan: forwards, onwards after a stop, and back.
//!
//! Every step is noted as begun before anything is done for it and as done afterwards, durably. So after a kill at any
//! moment at most one step is in doubt, and it is known which. What a step makes is looked for before it is made
//! ([`Action::probe`]): what was there before the takeover is left alone when it is taken back.

use crate::bubble::{self, Bubble, Wishes};
use crate::names::{Names, expand};
use crate::plan::{InTest, Kind, Plan, Probe, Step};
use crate::proc;
use crate::report::{DryRun, Outcome, Progress, Report, StepOutcome, StepPlan, StepReport};
use crate::state::{Device, Mode, Phase, State, Status, StepState, Store, load, store_dir};
use crate::step::{Action, Found, Link, StepError, Work, end_leftovers, links_dir};
use crate::tools::Tools;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
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
}

/// A moment of a step; for tests that end the process there.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Nothing is noted, nothing done.
    Before,
    /// Noted as begun.
    Noted,
    /// Done, and not noted.
    Acted,
    /// Noted as done.
    After,
}

type Trap = Box<dyn Fn(usize, Moment)>;

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
            let next = match state.phase {
                Phase::Running | Phase::Stopped => {
                    format!(
                        "'{}' goes on with it, '{}' takes it back",
                        self.context.commands.resume, self.context.commands.undo
                    )
                }
                Phase::Done | Phase::Undoing => format!("'{}' takes it back", self.context.commands.undo),
            };
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
            let next = format!("'{}' finishes that", self.context.commands.undo);
            return Err(Problem::refused(what, "it is being taken back", next));
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
                    (new.status, new.found, new.made) = (old.status, old.found, old.made);
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
        found: false,
        made: Vec::new(),
        outcome: None,
        seconds: 0.0,
    }
}

fn variables(context: &Context) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::from([
        ("VARVE_GROUP".to_owned(), context.group.clone()),
        ("VARVE_POINT".to_owned(), context.point.time.clone()),
        ("VARVE_TEST".to_owned(), u8::from(context.mode == Mode::Test).to_string()),
    ]);
    for (number, device) in context.devices.iter().enumerate() {
        variables.insert(format!("VARVE_VOLUME{number}"), device.device.display().to_string());
    }
    variables
}

/// What each step becomes for these devices.
fn actions(plan: &Plan, context: &Context) -> Result<Vec<Action>, Problem> {
    let device_name =
        |(number, device): (usize, &Device)| (format!("volume{number}"), device.device.display().to_string());
    let mut names: Names = context.devices.iter().enumerate().map(device_name).collect();
    let (mut actions, mut known) = (Vec::new(), Vec::new());
    for step in &plan.steps {
        let action = action(step, context, &mut names, &mut known).map_err(|unknown| {
            let what = format!("{}: {{{unknown}}} stands for nothing in step '{}'", plan.file.display(), step.name);
            Problem::usage(what, "no earlier step gives that name", "correct the plan")
        })?;
        actions.push(action);
    }
    Ok(actions)
}

fn action(step: &Step, context: &Context, names: &mut Names, known: &mut Vec<Link>) -> Result<Action, String> {
    let test = context.mode == Mode::Test;
    let skip = test && step.in_test == InTest::Skip;
    let all = |words: &[String], names: &Names| words.iter().map(|word| expand(word, names)).collect();
    let action = match &step.kind {
        Kind::Attach { volumes } => {
            let links = links_of(volumes, context, test);
            for (link, name) in &links {
                // A step left out makes no links, but what comes later still finds its devices.
                let path = if skip { &link.device } else { &link.path };
                names.insert(name.clone(), path.display().to_string());
            }
            known.extend(links.iter().map(|(link, _)| link.clone()));
            Action::Attach { links: links.into_iter().map(|(link, _)| link).collect() }
        }
        Kind::Lvm { vg, devices } => {
            let devices: Vec<String> = match devices.is_empty() {
                true => context.devices.iter().map(|device| device.device.display().to_string()).collect(),
                false => all(devices, names)?,
            };
            let name = if test && !skip { format!("varve-test-{}-{vg}", context.group) } else { vg.clone() };
            names.insert(vg.clone(), name.clone());
            Action::Lvm { vg: vg.clone(), name, devices: devices.into_iter().map(PathBuf::from).collect() }
        }
        Kind::Mount { device, at, fstype, options } => {
            let mut options = options.clone();
            // XFS refuses an id that is mounted already, and the original may be on this host.
            if test && fstype == "xfs" && !options.iter().any(|option| option == "nouuid") {
                options.push("nouuid".to_owned());
            }
            let device = PathBuf::from(expand(device, names)?);
            let linked = known.iter().find(|link| link.path == device).map(|link| link.device.clone());
            let real = linked.unwrap_or_else(|| device.clone());
            Action::Mount { device, real, at: at.clone(), fstype: fstype.clone(), options }
        }
        Kind::Address { address, prefix, interface, announce, take_from_others } => Action::Address {
            address: *address,
            prefix: *prefix,
            interface: interface.clone(),
            announce: *announce,
            take_from_others: *take_from_others,
        },
        Kind::Unit { unit, test_run } => match test_run {
            Some(run) if test => Action::Program { run: all(run, names)? },
            _ => Action::Unit { unit: unit.clone() },
        },
        Kind::Command { run, undo, done_if, test_run, test_undo } => {
            let pick = |live: &Vec<String>, in_test: &Option<Vec<String>>| match in_test {
                Some(words) if test => words.clone(),
                _ => live.clone(),
            };
            let done_if = done_if.as_ref().map(|words| all(words, names)).transpose()?;
            Action::Command {
                run: all(&pick(run, test_run), names)?,
                undo: all(&pick(undo, test_undo), names)?,
                done_if,
            }
        }
        Kind::Check { probe, every } => {
            let probe = match probe {
                Probe::Command { run } => Probe::Command { run: all(run, names)? },
                other => other.clone(),
            };
            Action::Check { probe, every_ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX) }
        }
    };
    if !skip {
        return Ok(action);
    }
    let why = match &action {
        Action::Unit { unit } => format!("{unit} is not started in a test: the bubble has no systemd"),
        _ => "the plan leaves it out in a test".to_owned(),
    };
    Ok(Action::Nothing { why })
}

fn links_of(volumes: &[(String, String)], context: &Context, test: bool) -> Vec<(Link, String)> {
    let dir = links_dir(&context.paths, &context.group, test);
    let link = |name: String, device: &Device| (Link { path: dir.join(&name), device: device.device.clone() }, name);
    if volumes.is_empty() {
        let all = context.devices.iter().enumerate();
        return all.map(|(number, device)| link(format!("volume{number}"), device)).collect();
    }
    let find = |volume: &String| context.devices.iter().find(|device| device.volume == *volume);
    volumes.iter().filter_map(|(name, volume)| Some(link(name.clone(), find(volume)?))).collect()
}

/// What is to be taken back, without the plan: its file may be gone.
#[derive(Clone, Debug)]
pub struct Undo {
    /// Where everything is.
    pub paths: Paths,
    /// The group.
    pub group: String,
    /// The takeover or the test.
    pub mode: Mode,
    /// Where the system's programs are.
    pub tools: Tools,
    /// The command that does this, to suggest again.
    pub command: String,
}

/// Takes back what a run did, as it was done; neither the plan nor the devices are needed. See [`Runner::undo`].
///
/// # Errors
/// As [`Runner::undo`]; kind `NotFound` if there is nothing to take back.
pub fn undo(undo: &Undo, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
    undo_with(undo, Arc::default(), None, progress)
}

/// Takes away what an earlier test of the group left, however it ended: steps, processes, mounts, namespaces, links.
/// `None`: there was nothing.
///
/// # Errors
/// Something cannot be taken away, or a test is being run.
pub fn clean(paths: &Paths, group: &str, tools: &Tools) -> Result<Option<Report>, Problem> {
    check_name("group", group)?;
    let undoing = Undo {
        paths: paths.clone(),
        group: group.to_owned(),
        mode: Mode::Test,
        tools: tools.clone(),
        command: "try again".to_owned(),
    };
    match undo(&undoing, &mut |_| {}) {
        Ok(report) => match report.problem.clone() {
            Some(problem) => Err(problem),
            None => Ok(Some(report)),
        },
        Err(problem) if problem.kind == varve_common::problem::ProblemKind::NotFound => {
            // Killed before it could be noted, or between the last note and the last removal.
            let _store = Store::open(paths, group, Mode::Test)?;
            match bubble::destroy(&paths.takeover_bubble(group), &[]) {
                Ok(_) => Ok(None),
                Err(why) => Err(bubble_stays(group, why)),
            }
        }
        Err(problem) => Err(problem),
    }
}

fn bubble_stays(group: &str, why: String) -> Problem {
    let what = format!("the bubble of a test of group '{group}' cannot be taken away");
    Problem::failed(what, why, "see to that, then try again")
}

/// Where a takeover or test of a group stands, for status; `None`: there is none. Nothing is locked or touched.
///
/// # Errors
/// The state is there and cannot be read.
pub fn standing(paths: &Paths, group: &str, mode: Mode) -> Result<Option<Standing>, Problem> {
    let Some(state) = load(&store_dir(paths, group, mode).join("state.json"))? else { return Ok(None) };
    Ok(Some(Standing {
        phase: state.phase,
        began: state.began.clone(),
        point: state.point.clone(),
        done: state.steps.iter().filter(|step| step.status == Status::Done).count(),
        total: state.steps.len(),
        left: left(&state),
    }))
}

/// Where a takeover stands.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Standing {
    /// How far it is.
    pub phase: Phase,
    /// When it began, RFC 3339.
    pub began: String,
    /// The point.
    pub point: PointReply,
    /// Steps that are done.
    pub done: usize,
    /// Steps of the plan.
    pub total: usize,
    /// What is in place because of it, in words.
    pub left: Vec<String>,
}

/// What is in place because of the run.
fn left(state: &State) -> Vec<String> {
    let there = |step: &&StepState| matches!(step.status, Status::Begun | Status::Done) && !step.found;
    let words = |step: &StepState| {
        let words = step.action.left_text()?;
        Some(if step.status == Status::Begun { format!("{words} (perhaps: the step did not end)") } else { words })
    };
    state.steps.iter().filter(there).filter_map(words).collect()
}

fn undo_with(
    undoing: &Undo,
    cancel: Arc<AtomicBool>,
    trap: Option<&Trap>,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report, Problem> {
    let store = Store::open(&undoing.paths, &undoing.group, undoing.mode)?;
    let Some(state) = store.load()? else {
        let what = format!("there is no takeover of group '{}' to take back", undoing.group);
        return Err(Problem::not_found(what, "nothing of it is in place on this host", "nothing is to be done"));
    };
    let dir = undoing.paths.takeover_bubble(&undoing.group);
    let bubble = Some(undoing.mode).filter(|mode| *mode == Mode::Test).and_then(|_| Bubble::open(&dir));
    let mut engine = Engine {
        store,
        state,
        bubble,
        tools: &undoing.tools,
        cancel: &cancel,
        trap,
        resume: &undoing.command,
        undo: &undoing.command,
    };
    engine.backwards(&dir, progress)
}

/// A run that has the lock.
struct Engine<'a> {
    store: Store,
    state: State,
    /// Of a test.
    bubble: Option<Bubble>,
    tools: &'a Tools,
    cancel: &'a AtomicBool,
    trap: Option<&'a Trap>,
    resume: &'a str,
    undo: &'a str,
}

impl Engine<'_> {
    fn save(&self) -> Result<(), Problem> {
        self.store.save(&self.state)
    }

    fn moment(&self, place: usize, moment: Moment) {
        if let Some(trap) = self.trap {
            trap(place + 1, moment);
        }
    }

    fn work(&self, place: usize) -> Result<Work<'_>, StepError> {
        let timeout = Duration::from_millis(self.state.steps[place].timeout_ms);
        let no_file = |error| StepError::new(format!("what its programs print cannot be kept: {error}"));
        Ok(Work {
            number: place + 1,
            run: self.state.run.clone(),
            test: self.state.mode == Mode::Test,
            deadline: Instant::now() + timeout,
            timeout,
            cancel: self.cancel,
            tools: self.tools,
            output: self.store.output(place + 1).map_err(no_file)?,
            child: self.store.child().map_err(no_file)?,
            variables: &self.state.variables,
        })
    }

    /// Does something for a step where it belongs: inside the bubble or not.
    fn at<T: Send>(
        &self,
        action: &Action,
        place: usize,
        what: impl FnOnce(&Work<'_>) -> Result<T, StepError> + Send,
    ) -> Result<T, StepError> {
        let work = self.work(place)?;
        match &self.bubble {
            Some(bubble) if action.is_inside() => {
                bubble.enter(|| what(&work)).unwrap_or_else(|why| Err(StepError::new(why)))
            }
            _ => what(&work),
        }
    }

    fn forwards(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let began = Instant::now();
        let total = self.state.steps.len();
        let mut steps: Vec<StepReport> = Vec::new();
        let mut problem = None;
        for place in 0..total {
            if problem.is_some() {
                steps.push(self.told(place, StepOutcome::NotReached, 0.0, String::new(), None));
                continue;
            }
            let (name, what) = (self.state.steps[place].name.clone(), self.wanted(place).text());
            progress(&Progress::Begins { number: place + 1, total, name, what, undo: false });
            let at = Instant::now();
            let result = match self.cancel.load(Ordering::Relaxed) {
                true => Err(StepError::new("the operator stopped it")),
                false => self.forward(place),
            };
            let seconds = at.elapsed().as_secs_f64();
            let report = match result {
                Ok((outcome, detail)) => self.told(place, outcome, seconds, detail, None),
                Err(error) => {
                    problem = Some(self.stopped(place, &error));
                    self.told(place, StepOutcome::Failed, seconds, error.why, error.output)
                }
            };
            self.state.steps[place].outcome = Some(report.outcome);
            self.state.steps[place].seconds = seconds;
            self.state.phase = if problem.is_some() { Phase::Stopped } else { Phase::Running };
            self.save()?;
            if problem.is_none() {
                self.moment(place, Moment::After);
            }
            progress(&Progress::Ended(report.clone()));
            steps.push(report);
        }
        if problem.is_none() {
            self.state.phase = Phase::Done;
            self.state.boot = proc::boot_id();
            self.save()?;
        }
        Ok(self.report(steps, began, problem))
    }

    /// What the step is to become. While it is in doubt, the state has what it was when it was done.
    fn wanted(&self, place: usize) -> &Action {
        let step = &self.state.steps[place];
        step.wanted.as_ref().unwrap_or(&step.action)
    }

    fn forward(&mut self, place: usize) -> Result<(StepOutcome, String), StepError> {
        self.moment(place, Moment::Before);
        let wanted = self.wanted(place).clone();
        if let Action::Nothing { why } = &wanted {
            self.state.steps[place].status = Status::Done;
            return Ok((StepOutcome::Skipped, why.clone()));
        }
        if let Some(in_place) = self.already(place, &wanted)? {
            self.state.steps[place].status = Status::Done;
            return Ok((StepOutcome::InPlace, in_place));
        }
        let made = wanted.to_make();
        let step = &mut self.state.steps[place];
        (step.action, step.wanted, step.status) = (wanted.clone(), None, Status::Begun);
        // What an earlier try made stays ours.
        step.made.extend(made);
        self.save().map_err(|problem| StepError::new(format!("{problem}")))?;
        self.moment(place, Moment::Noted);
        let detail = self.at(&wanted, place, |work| wanted.apply(work))?;
        self.moment(place, Moment::Acted);
        self.state.steps[place].status = Status::Done;
        Ok((StepOutcome::Done, detail))
    }

    /// Whether the step need not be done; if it must, nothing of an earlier try is in its way any more.
    fn already(&mut self, place: usize, wanted: &Action) -> Result<Option<String>, StepError> {
        let (status, old) = (self.state.steps[place].status, self.state.steps[place].action.clone());
        if status == Status::Begun {
            end_leftovers(&self.work(place)?)?;
        }
        let touched = matches!(status, Status::Begun | Status::Done);
        if touched && old != *wanted {
            // The devices have other numbers, or a step that failed was corrected.
            self.take_back(place)?;
        }
        match (self.at(wanted, place, |work| wanted.probe(work))?, status) {
            (Found::Yes, Status::Begun | Status::Done) if old == *wanted => {
                self.at(wanted, place, |work| {
                    wanted.refresh(work);
                    Ok(())
                })?;
                Ok(Some("still there".to_owned()))
            }
            (Found::Yes, _) => {
                self.state.steps[place].found = true;
                Ok(Some("it was there before".to_owned()))
            }
            (Found::Unknown, Status::Done) if old == *wanted && self.state.boot == proc::boot_id() => {
                Ok(Some("it was run".to_owned()))
            }
            (Found::Unknown, Status::Begun) if old == *wanted => {
                // Nobody knows how far it got.
                self.take_back(place)?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Takes a step back as it was done.
    fn take_back(&mut self, place: usize) -> Result<String, StepError> {
        let step = &self.state.steps[place];
        let (action, made) = (step.action.clone(), step.made.clone());
        if step.found {
            return Ok(String::new());
        }
        self.at(&action, place, |work| action.undo(work, &made))
    }

    fn stopped(&self, place: usize, error: &StepError) -> Problem {
        let (name, number) = (&self.state.steps[place].name, place + 1);
        let what = format!("step {number} '{name}' of the takeover of group '{}' failed", self.state.group);
        let first = error.next.as_ref().map(|next| format!("{next}; then ")).unwrap_or_default();
        let next = match self.state.mode {
            Mode::Live => {
                format!("{first}'{}' goes on with this step, '{}' takes everything back", self.resume, self.undo)
            }
            Mode::Test => format!("{first}'{}' takes the test back", self.undo),
        };
        Problem::failed(what, error.why.clone(), next)
    }

    fn told(
        &self,
        place: usize,
        outcome: StepOutcome,
        seconds: f64,
        detail: String,
        output: Option<String>,
    ) -> StepReport {
        let step = &self.state.steps[place];
        let (name, kind, what) = (step.name.clone(), step.kind.clone(), self.wanted(place).text());
        StepReport { number: place + 1, name, kind, outcome, seconds, what, detail, output }
    }

    fn report(&self, steps: Vec<StepReport>, began: Instant, problem: Option<Problem>) -> Report {
        let outcome = if problem.is_none() { Outcome::Done } else { Outcome::Stopped };
        let good = |step: &&StepReport| step.kind == "check" && step.outcome == StepOutcome::Done;
        let checks = steps.iter().filter(good).count();
        let since: Option<jiff::Timestamp> = self.state.began.parse().ok();
        let rto = since.map(|since| jiff::Timestamp::now().duration_since(since).as_secs_f64().max(0.0));
        Report {
            group: self.state.group.clone(),
            mode: self.state.mode,
            point: self.state.point.clone(),
            plan: self.state.plan.clone(),
            outcome,
            began: self.state.began.clone(),
            rto_seconds: rto.filter(|_| outcome == Outcome::Done),
            seconds: began.elapsed().as_secs_f64(),
            checks,
            steps,
            left: left(&self.state),
            problem,
        }
    }

    fn backwards(&mut self, dir: &Path, progress: &mut dyn FnMut(&Progress)) -> Result<Report, Problem> {
        let began = Instant::now();
        self.state.phase = Phase::Undoing;
        self.save()?;
        let mut steps = self.pass_back(progress)?;
        if self.state.mode == Mode::Test {
            let numbers: Vec<_> =
                self.state.devices.iter().filter_map(|device| proc::device_numbers(&device.device)).collect();
            let run = self.state.run.clone();
            proc::end_all(|| proc::marked(&run, None), Duration::from_secs(2));
            bubble::destroy(dir, &numbers).map_err(|why| bubble_stays(&self.state.group, why))?;
            self.bubble = None;
            if steps.iter().any(|step| step.outcome == StepOutcome::UndoFailed) {
                // What was in the bubble's way is gone with it.
                steps = self.pass_back(progress)?;
            }
            let _ = std::fs::remove_dir(dir.parent().unwrap_or(dir));
        }
        let failed: Vec<&StepReport> = steps.iter().filter(|step| step.outcome == StepOutcome::UndoFailed).collect();
        let problem = (!failed.is_empty()).then(|| {
            let what: Vec<String> = failed.iter().map(|step| format!("step {} '{}'", step.number, step.name)).collect();
            let why: Vec<String> = failed.iter().map(|step| format!("'{}': {}", step.name, step.detail)).collect();
            let what = format!("of the takeover of group '{}', not taken back: {}", self.state.group, what.join(", "));
            Problem::failed(what, why.join("; "), format!("see to that, then '{}' again", self.undo))
        });
        match &problem {
            None => self.store.forget()?,
            Some(_) => self.save()?,
        }
        let outcome = if problem.is_none() { Outcome::Undone } else { Outcome::UndoIncomplete };
        let report = self.report(steps, began, problem);
        Ok(Report { outcome, rto_seconds: None, ..report })
    }

    /// Takes back every step that is not taken back yet, the last first.
    fn pass_back(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<Vec<StepReport>, Problem> {
        let total = self.state.steps.len();
        let mut steps = Vec::new();
        for place in (0..total).rev() {
            let step = &self.state.steps[place];
            let action = step.action.clone();
            if !matches!(step.status, Status::Begun | Status::Done) || matches!(action, Action::Nothing { .. }) {
                continue;
            }
            let at = Instant::now();
            let (outcome, detail, output) = if step.found {
                (StepOutcome::LeftAsFound, "it was there before".to_owned(), None)
            } else {
                let (name, what) = (step.name.clone(), action.undo_text().unwrap_or_default());
                if action.has_undo() {
                    progress(&Progress::Begins { number: place + 1, total, name, what, undo: true });
                }
                self.moment(place, Moment::Before);
                match self.back(place, &action) {
                    Ok(detail) => (StepOutcome::Undone, detail, None),
                    Err(error) => (StepOutcome::UndoFailed, error.why, error.output),
                }
            };
            self.moment(place, Moment::Acted);
            if outcome != StepOutcome::UndoFailed {
                self.state.steps[place].status = Status::Undone;
            }
            self.save()?;
            self.moment(place, Moment::After);
            let what = action.undo_text().unwrap_or_else(|| "nothing to take back".to_owned());
            let report = self.told(place, outcome, at.elapsed().as_secs_f64(), detail, output);
            let report = StepReport { what, ..report };
            if action.has_undo() || outcome == StepOutcome::UndoFailed {
                progress(&Progress::Ended(report.clone()));
                steps.push(report);
            }
        }
        Ok(steps)
    }

    fn back(&mut self, place: usize, action: &Action) -> Result<String, StepError> {
        // Of a step that was killed, or whose undo was.
        end_leftovers_unless_program(action, &self.work(place)?, self.state.steps[place].status)?;
        if self.state.mode == Mode::Test && self.bubble.is_none() && action.is_inside() {
            return Ok("gone with the bubble".to_owned());
        }
        self.take_back(place)
    }
}

/// A program that a test runs is ended by its own undo; daemons that a finished command left are ended by the command's.
fn end_leftovers_unless_program(action: &Action, work: &Work<'_>, status: Status) -> Result<(), StepError> {
    if status != Status::Begun || matches!(action, Action::Program { .. }) {
        return Ok(());
    }
    end_leftovers(work).map(drop)
}
