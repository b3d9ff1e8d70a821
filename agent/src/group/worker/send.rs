//! What goes out: data, marks, images, reports.

use super::backlog::Stretch;
use super::*;

impl Worker {
    /// Sends what there is to send; whether there was something.
    pub(super) async fn send_turn(
        &mut self,
        state: &mut State,
        session: &mut Session,
        sent_max: &AtomicU64,
    ) -> Result<bool, Ended> {
        let mut busy = self.send_data(state, session, sent_max).await?;
        if let Some(mark) = state.gap.next_mark(session.remote_consistent, session.sent) {
            self.send_mark(state, session, mark.kind, mark.reason).await?;
            session.remote_consistent = mark.kind == MarkKind::GapEnd;
            if session.remote_consistent {
                // From here on the replicas are not empty, and regions are compared before they are sent.
                session.fresh.clear();
                self.sync.shared().not_fresh();
            }
            // A gap may have begun while the mark was on its way.
            if session.remote_consistent && state.gap.open().is_none() {
                state.closing = Some(session.sent);
                // What is acknowledged after the mark proves that the mark has landed: do not wait for the next write.
                let _ = self.source.mark(RecordKind::Canary, &[]);
            }
            busy = true;
        }
        while let Some(next) = {
            let fresh = &session.fresh;
            session.regions.next(session.sent, |volume| fresh.get(usize::from(volume)).copied().unwrap_or(false))
        } {
            self.region(state, session, next).await?;
            busy = true;
        }
        self.drive_verify(state);
        self.finish_gap(state, session);
        self.look_for_left(state, session);
        self.report(state, session).await?;
        self.send_replies(state, session).await?;
        Ok(busy)
    }

    /// Sends a frame. While the receiver does not take it, whatever does not need the receiver goes on.
    async fn push(
        &mut self,
        state: &mut State,
        session: &mut Session,
        frame: Frame,
        body: Vec<Bytes>,
    ) -> Result<(), Ended> {
        let sent = session.earlier.is_none().then_some(session.sent);
        let mut pushing = pin!(session::send_frame(&mut session.send, frame, body));
        let mut pace = Pace::default();
        let mut pause = POLL_MIN;
        loop {
            tokio::select! {
                biased;
                outcome = &mut pushing => return outcome,
                Some(command) = self.commands.recv() => self.command(state, command, true),
                () = tokio::time::sleep(pause) => {
                    let walked = state.walked;
                    self.every_turn(state, sent);
                    pause = pace.next(state.walked > walked);
                }
            }
        }
    }

    pub(super) async fn push_control(
        &mut self,
        state: &mut State,
        session: &mut Session,
        kind: FrameKind,
        body: Vec<u8>,
    ) -> Result<(), Ended> {
        self.push(state, session, Frame::plain(kind, session.sent, &body), vec![Bytes::from(body)]).await
    }

    pub(super) async fn send_data(
        &mut self,
        state: &mut State,
        session: &mut Session,
        sent_max: &AtomicU64,
    ) -> Result<bool, Ended> {
        let turn_end = session.sent + TURN_BYTES;
        let mut busy = false;
        while session.sent < turn_end {
            self.look_ahead(state, Some(session.sent));
            // Looked at for every frame: a gap may begin while one is on its way.
            let limit = state.gap.cut_limit(session.remote_consistent);
            let good = state.looked_to.max(session.sent);
            let until = limit.map_or(good, |limit| good.min(limit.max(session.sent)));
            let (end, body) = match self.next_stretch(state, session, until).await? {
                Stretch::Bytes(end, body) => (end, body),
                Stretch::End => break,
                // All buffers are on their way: whatever else there is to do goes first.
                Stretch::NoBuffer => return Ok(busy),
            };
            state.sent_ever = state.sent_ever.max(end);
            self.send_frame(state, session, end, body, sent_max).await?;
            busy = true;
        }
        Ok(busy)
    }

    /// Sends the bytes from where the session stands up to `end`.
    pub(super) async fn send_frame(
        &mut self,
        state: &mut State,
        session: &mut Session,
        end: u64,
        mut body: Body,
        sent_max: &AtomicU64,
    ) -> Result<(), Ended> {
        let length = end - session.sent;
        let mut frame = Frame::plain(FrameKind::Data, session.sent, body.as_ref());
        if session.compression.wanted() {
            self.compress(session, &mut frame, &mut body);
        }
        sent_max.store(end, Ordering::Release);
        let wire_bytes = body.as_ref().len() as u64;
        let before = Instant::now();
        self.push(state, session, frame, vec![Bytes::from_owner(body)]).await?;
        let now = Instant::now();
        session.compression.sent(wire_bytes, now - before, now);
        Counters::add(&self.shared.counters.frames, 1);
        Counters::add(&self.shared.counters.stream_bytes, length);
        Counters::add(&self.shared.counters.wire_bytes, wire_bytes);
        session.sent = end;
        Ok(())
    }

    pub(super) fn compress(&self, session: &mut Session, frame: &mut Frame, body: &mut Body) {
        let Some(mut packed) = self.frames.take() else { return };
        let Ok(length) = lz4_flex::block::compress_into(body.as_ref(), &mut packed) else { return };
        if session.compression.worth(body.as_ref().len(), length) {
            frame.codec = Codec::Lz4;
            frame.body_bytes = length;
            *body = Body::Pooled(packed, length);
            Counters::add(&self.shared.counters.frames_compressed, 1);
        }
    }

    pub(super) async fn send_mark(
        &mut self,
        state: &mut State,
        session: &mut Session,
        kind: MarkKind,
        reason: Option<GapReason>,
    ) -> Result<(), Ended> {
        let mark = Mark {
            kind,
            reason,
            incarnation: session.earlier.unwrap_or(self.shared.incarnation),
            position: session.sent,
            // As the records around it: a wall clock that was set back is met slowly.
            time_ns: self.shared.stream_ns(),
            epoch: self.shared.facts().epoch,
            height_min: 0,
        };
        self.push_control(state, session, FrameKind::Mark, mark.encode().to_vec()).await
    }

    pub(super) async fn send_image(
        &mut self,
        state: &mut State,
        session: &mut Session,
        id: u64,
        blocks: u16,
    ) -> Result<(), Ended> {
        let Some(read) = session.regions.get(id) else { return Ok(()) };
        let overtaken = lock(&self.sync.shared().tracker).overtaken(id);
        let extents = image_extents(read, blocks, &overtaken);
        if extents.is_empty() {
            self.region_done(session, id);
            return Ok(());
        }
        let mut head = Vec::with_capacity(size_of::<ImageHeader>() + extents.len() * size_of::<ImageExtent>());
        let zero_or_not = extents.iter().map(|(offset, length, range)| (*offset, *length, range.is_none()));
        Image::encode_head(id, read.volume, zero_or_not, &mut head);
        // The bytes go out as they were read: no copy, and the buffer is free when the transport is done with it.
        let bytes = session.regions.take_bytes(id);
        let ranges = extents.iter().filter_map(|(_, _, range)| *range);
        let parts: Vec<Bytes> =
            std::iter::once(Bytes::from(head)).chain(ranges.map(|(from, to)| bytes.slice(from..to))).collect();
        let frame = Frame::of_parts(FrameKind::Image, session.sent, parts.iter().map(|part| &part[..]));
        Counters::add(&self.shared.counters.image_bytes, frame.body_bytes as u64);
        self.push(state, session, frame, parts).await
    }

    pub(super) async fn report(&mut self, state: &mut State, session: &mut Session) -> Result<(), Ended> {
        let now = Instant::now();
        if session.last_report.is_some_and(|last| now.duration_since(last) < REPORT_EVERY) {
            return Ok(());
        }
        session.last_report = Some(now);
        if self.shared.facts().gap.is_some() {
            self.update_sync_facts();
        }
        // Each of these locks the facts by itself.
        let (data, rpo, resync) = (self.shared.data(), self.shared.rpo(), self.shared.resync());
        let (reason, verify) = {
            let facts = self.shared.facts();
            (facts.gap, facts.verify.clone())
        };
        let report = Report {
            captured: self.source.stream().producer(),
            data,
            rpo_ms: rpo.map(|rpo| rpo.as_millis() as u64),
            lagging_after_ms: self.shared.lagging_after.as_millis() as u64,
            reason,
            resync,
            verify,
        };
        self.push_control(state, session, FrameKind::Report, messages::encode(&report)).await
    }
}
