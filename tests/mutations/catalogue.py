"""The museum: bugs that other systems have or had, each put into our own source by exact replacements of text.

`edits` must match exactly once each. `caught_by`: tests that are known to fail then. `museum`: the word of issue 3
for it where it has one. `hangs`: by waiting in vain, which takes half a minute.
"""

from __future__ import annotations

from dataclasses import dataclass

ISSUE = (
    "ack before commit",
    "delete before send",
    "fsync removed",
    "cursor ahead of data",
    "seconds taken for milliseconds in TTL",
    "wipe on corruption",
    "fall back to RAM silently",
    "give up after N tries",
    "drop newest at the limit but ack it",
    "ack on a new connection for an old message",
    "unbounded intake",
    "order by wall clock",
)
"""What the issue names; there is a mutation for each."""

SPOOL, FIELDPOST = "edge/fieldpost/spool/", "edge/fieldpost/"
TEST_SPOOL = "tests/edge/test_spool.py::"
TEST_MUSEUM = "tests/edge/test_spool_museum.py::"
TEST_ACK = "tests/journeys/test_acknowledgement.py::"
TEST_PROMISES = "tests/journeys/test_promises.py::"
TEST_FORWARD = "tests/edge/test_forward.py::"


@dataclass(frozen=True, slots=True)
class Edit:
    """`old` in `file` becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """One bug; `why` says where it is known from, or what it would cost."""

    name: str
    why: str
    edits: tuple[Edit, ...]
    caught_by: tuple[str, ...]
    museum: str = ""
    hangs: bool = False

    @property
    def is_quick(self) -> bool:
        """Caught by tests that start no server and wait for nothing that a bug keeps from coming."""
        return not self.hangs and all(test.startswith("tests/edge/") for test in self.caught_by)


CATALOGUE = (
    # What is acknowledged, and when.
    Mutation(
        "ack-before-commit",
        "Most brokers confirm what is in memory: mosquitto and NanoMQ do, and Vector may before its fsync.",
        (Edit(SPOOL + "queue.py", "            safe = self._unwritten(lane)\n", "            safe = lane.head\n"),),
        (TEST_SPOOL + "test_nothing_is_safe_before_the_commit",),
        "ack before commit",
    ),
    Mutation(
        "ack-with-its-neighbours",
        "Everything that waits is acknowledged as soon as the first of it is safe.",
        (
            Edit(
                FIELDPOST + "ingest.py",
                "while self._pending and self._spool.is_safe(self._pending[0].ticket):",
                "while self._pending:",
            ),
        ),
        (TEST_MUSEUM + "test_only_messages_whose_readings_are_safe_are_acknowledged",),
        "ack before commit",
    ),
    Mutation(
        "failed-commit-counted-as-done",
        "Greengrass goes on in memory when an insert fails; the sender is told that all is well.",
        (
            Edit(
                SPOOL + "__init__.py",
                "            self.queue.failed(commit)\n            raise\n",
                "            self.queue.done(commit)\n            raise\n",
            ),
        ),
        (TEST_MUSEUM + "test_a_commit_that_fails_acknowledges_nothing_and_leaves_nothing_of_itself_on_the_card",),
        "ack before commit",
    ),
    Mutation(
        "forgetful-uplink-believed",
        "mosquitto confirmed 500 messages and had none of them after a kill -9.",
        (Edit(SPOOL + "queue.py", "        if not self.links[route].durable:\n", "        if False:\n"),),
        (TEST_SPOOL + "test_what_an_uplink_that_forgets_has_confirmed_is_not_safe_before_the_commit",),
    ),
    Mutation(
        "durable-without-a-look",
        "Some brokers accept the queue type and ignore it; a classic queue forgets what it confirmed.",
        (
            Edit(
                FIELDPOST + "uplinks/amqp.py",
                "        return await connection.queue_kind(self.settings.queue) in DURABLE_QUEUES\n",
                "        return True\n",
            ),
        ),
        (TEST_PROMISES + "test_status_says_which_far_sides_keep_what_they_confirm",),
    ),
    Mutation(
        "taken-beyond-a-hole",
        "The rows behind a lost message overtake it upstream.",
        (
            Edit(
                FIELDPOST + "ingest.py",
                "        if data.rows and data.first_seq > self._spool.upto(key) + 1:\n",
                "        if False:\n",
            ),
        ),
        (TEST_ACK + "test_ack_stops_at_a_hole_until_it_is_filled",),
    ),
    Mutation(
        "one-uplink-speaks-for-all",
        "Confirmed by one durable uplink, and given up for the other, which never had it.",
        (
            Edit(
                SPOOL + "queue.py",
                "return min(self.progress[route, lane.name].outstanding(lane.committed) for route in self.routes)",
                "return max(self.progress[route, lane.name].outstanding(lane.committed) for route in self.routes)",
            ),
        ),
        (TEST_SPOOL + "test_one_durable_confirmation_of_two_routes_is_not_enough",),
    ),
    Mutation(
        "ack-on-a-new-connection-for-an-old-message",
        "A PUBACK counts for the message of that number on its own connection: on a later one it frees another.",
        (
            Edit(
                FIELDPOST + "ingest.py",
                "        self._pending.clear()\n        self._waiting.clear()\n",
                "        self._waiting.clear()\n",
            ),
            Edit(
                FIELDPOST + "ingest.py",
                "                self._waiting[pending.node] -= 1\n",
                "                pending.connection = (self._pending or [pending])[-1].connection\n",
            ),
        ),
        (TEST_MUSEUM + "test_a_new_connection_acknowledges_nothing_that_came_on_an_old_one",),
        "ack on a new connection for an old message",
    ),
    Mutation(
        "newest-dropped-at-the-limit-but-acknowledged",
        "mosquitto's queue limit: the newest is dropped, and its PUBACK says success.",
        (
            Edit(
                FIELDPOST + "ingest.py",
                "            self.refused += 1\n",
                "            self.refused += 1\n"
                "            past = data.first_seq + len(data.rows)\n"
                "            self._spool.mark((node, data.install, data.boot), data.first_seq, past - 1)\n",
            ),
        ),
        (TEST_MUSEUM + "test_what_found_no_room_is_not_acknowledged_and_is_taken_when_it_comes_again",),
        "drop newest at the limit but ack it",
    ),
    Mutation(
        "unbounded-intake",
        "ThingsBoard's gateway takes without limit into memory; EdgeX ends by the kernel's hand.",
        (
            Edit(
                SPOOL + "queue.py",
                "        return max(0, self.terms.stage_readings - self.waiting)",
                "        return 1 << 30",
            ),
        ),
        (TEST_MUSEUM + "test_what_found_no_room_is_not_acknowledged_and_is_taken_when_it_comes_again",),
        "unbounded intake",
    ),
    Mutation(
        "floor-of-free-disk-ignored",
        "Telegraf's disk buffer and edgeHub's store fill the disk, and everything else on it stops.",
        (
            Edit(
                SPOOL + "__init__.py",
                "        elif self._card.free < self._settings.min_free_bytes:",
                "        elif self._card.free < 0:",
            ),
        ),
        (TEST_MUSEUM + "test_below_the_floor_of_free_disk_nothing_more_is_taken",),
        "unbounded intake",
    ),
    Mutation(
        "dedup-switched-off",
        "ThingsBoard's gateway sent every reading twice by a race; nothing downstream could tell.",
        (
            Edit(
                SPOOL + "marks.py",
                "        fresh = self._missing(first, last)\n",
                "        fresh = [(first, last)]\n",
            ),
        ),
        (
            TEST_SPOOL + "test_a_repeat_is_no_second_reading_also_after_a_restart",
            "tests/edge/test_marks.py::test_marks_take_each_row_once_and_know_the_contiguous_part",
        ),
    ),
    Mutation(
        "gap-invented-by-a-new-gateway",
        "What was acknowledged by the gateway before is no loss, and an unclean stop invents none.",
        (
            Edit(
                FIELDPOST + "ingest.py",
                "            self._spool.mark(key, 0, data.held - 1)\n",
                "            for a, b in self._spool.mark(key, 0, data.held - 1):\n"
                '                self._spool.report(Event("gap", node, install, boot, a, b, "never came"))\n',
            ),
        ),
        (TEST_ACK + "test_a_new_gateway_does_not_free_what_it_has_not_seen",),
    ),
    # The card.
    Mutation(
        "fsync-removed",
        "ThingsBoard's file store flushes and calls it fsync; RabbitMQ's classic queues gave it up.",
        (Edit(SPOOL + "database.py", 'db.execute("PRAGMA synchronous=FULL")', 'db.execute("PRAGMA synchronous=OFF")'),),
        (TEST_MUSEUM + "test_what_is_safe_was_synced_to_the_disk_before",),
        "fsync removed",
    ),
    Mutation(
        "fsync-at-the-checkpoint-only",
        "SQLite's NORMAL, in mosquitto 2.1 and NanoMQ: a power cut takes all commits since the last checkpoint.",
        (
            Edit(
                SPOOL + "database.py",
                'db.execute("PRAGMA synchronous=FULL")',
                'db.execute("PRAGMA synchronous=NORMAL")',
            ),
        ),
        (TEST_MUSEUM + "test_what_is_safe_was_synced_to_the_disk_before",),
        "fsync removed",
    ),
    Mutation(
        "cursor-and-marks-ahead-of-data",
        "edgeHub writes message and queue entry in two steps, as its own source notes: one can be there alone.",
        (
            Edit(
                SPOOL + "log.py",
                "        with self._guard(), self._transaction() as db:\n            for lane, first, readings in work",
                "        with self._guard():\n            write_state(self._opened(), self._sql, work.state)\n"
                "        with self._guard(), self._transaction() as db:\n            for lane, first, readings in work",
            ),
        ),
        (TEST_MUSEUM + "test_a_commit_that_fails_acknowledges_nothing_and_leaves_nothing_of_itself_on_the_card",),
        "cursor ahead of data",
    ),
    Mutation(
        "cursor-of-a-cut-commit-ahead-of-data",
        "Positions above the card's end are given again after a crash: a cursor beyond it skips their new owners.",
        (
            Edit(SPOOL + "queue.py", ".saved(ends[name])", ".saved(self.lanes[name].head)"),
            Edit(
                SPOOL + "queue.py",
                "self.progress[route, name] = Progress(lane.head if live is None else min(live, lane.head),",
                "self.progress[route, name] = Progress(lane.head if live is None else live,",
            ),
        ),
        (TEST_MUSEUM + "test_a_commit_that_was_cut_saves_no_mark_and_no_progress_of_what_it_left_out",),
        "cursor ahead of data",
    ),
    Mutation(
        "marks-ahead-of-readings",
        "A row that is marked and not stored is refused as a repeat when the node sends it again.",
        (
            Edit(
                SPOOL + "queue.py",
                "changes = self.marks.changes() if whole else",
                "changes = self.marks.changes() if 1 else",
            ),
        ),
        (TEST_MUSEUM + "test_a_commit_that_was_cut_saves_no_mark_and_no_progress_of_what_it_left_out",),
        "cursor ahead of data",
    ),
    Mutation(
        "cursor-jumps-over-what-is-not-confirmed",
        "A later batch is confirmed first, and the one before it counts as delivered.",
        (
            Edit(
                SPOOL + "progress.py",
                "                self.spans.append(Span(self.live, flight.first))\n",
                "",
            ),
        ),
        (TEST_MUSEUM + "test_a_batch_that_was_overtaken_by_the_next_ones_confirmation_is_still_outstanding",),
        "cursor ahead of data",
    ),
    Mutation(
        "pruned-before-confirmed",
        "NanoMQ deletes the row before it sends the message (nanomq#2432).",
        (
            Edit(
                SPOOL + "log.py",
                "at_ms <= prunable.at_ms and not wanted:",
                "at_ms <= prunable.at_ms:",
            ),
        ),
        (
            TEST_MUSEUM + "test_what_nobody_has_confirmed_is_kept_however_old_it_is",
            TEST_SPOOL + "test_a_route_that_is_not_configured_any_more_keeps_what_it_had_not_sent",
        ),
        "delete before send",
    ),
    Mutation(
        "stored-readings-dropped-with-their-route",
        "EdgeX deletes what is stored when the pipeline is edited.",
        (
            Edit(
                SPOOL + "queue.py",
                "            for route in known - set(self.routes):\n",
                "            for route in ():\n",
            ),
        ),
        (TEST_SPOOL + "test_a_route_that_is_not_configured_any_more_keeps_what_it_had_not_sent",),
        "delete before send",
    ),
    Mutation(
        "let-go-of-before-written",
        "What a far side has confirmed leaves the memory, and what is to be kept for a replay is never written.",
        (
            Edit(
                SPOOL + "stage.py",
                "min(self.committed, max(wanted_from, self.committed - self._recent))",
                "max(wanted_from, self.committed - self._recent)",
            ),
        ),
        (TEST_SPOOL + "test_what_a_durable_uplink_has_confirmed_is_safe_and_not_written_at_once",),
        "delete before send",
    ),
    Mutation(
        "never-deleted",
        "The disk is never given back: iotedge#3981, mosquitto#2647, thingsboard-gateway#2094.",
        (Edit(SPOOL + "log.py", "            if past <= prunable.end and", "            if past < 0 and"),),
        (TEST_SPOOL + "test_delivered_readings_leave_the_card_when_they_were_kept_long_enough",),
    ),
    Mutation(
        "all-sent-again-after-a-restart",
        "telegraf#16500: the progress is in memory only.",
        (
            Edit(
                SPOOL + "queue.py",
                "        progress.confirm(flight)\n        self._dirty_routes.add((route, name))\n",
                "        progress.confirm(flight)\n",
            ),
        ),
        (TEST_MUSEUM + "test_what_was_confirmed_is_not_sent_again_after_a_restart",),
    ),
    Mutation(
        "wiped-on-corruption",
        "Greengrass deletes a database that it can't read and starts empty; so does Kura, by default.",
        (
            Edit(
                SPOOL + "folder.py",
                '.with_name(self.main.name + suffix).rename(f"{aside}{suffix}")',
                ".with_name(self.main.name + suffix).unlink()",
            ),
            Edit(SPOOL + "log.py", "salvaged = salvage(self.path, db)", "salvaged = Salvaged()"),
        ),
        (TEST_MUSEUM + "test_a_file_that_cannot_be_read_is_set_aside_as_it_is_and_what_can_be_read_is_taken_over",),
        "wipe on corruption",
    ),
    Mutation(
        "damaged-batch-thrown-away",
        "Fluent Bit logs a bad chunk and discards it; nobody can look at it any more.",
        (Edit(SPOOL + "log.py", '            self._set_aside_row(db, "batch", row)\n', ""),),
        (TEST_MUSEUM + "test_a_damaged_batch_is_a_gap_with_its_rows_and_its_bytes_are_kept",),
        "wipe on corruption",
    ),
    Mutation(
        "damage-without-a-word",
        "One flipped bit, and NATS lost half a stream with no record of what.",
        (
            Edit(
                SPOOL + "queue.py",
                'self.report(Event("gap", node, install, boot, low, high, "damaged on the card"))',
                "pass",
            ),
        ),
        (TEST_MUSEUM + "test_a_damaged_batch_is_a_gap_with_its_rows_and_its_bytes_are_kept",),
    ),
    Mutation(
        "checksum-of-batches-not-checked",
        "SQLite has no checksum of its own: a flipped bit comes back as a value.",
        (Edit(SPOOL + "rows.py", "        if crc_of_batch(head, ids, body) != crc:\n", "        if False:\n"),),
        (TEST_MUSEUM + "test_a_batch_is_not_believed_when_anything_in_its_row_was_changed",),
    ),
    Mutation(
        "checksum-of-state-not-checked",
        "A flipped bit in a mark frees readings that never came.",
        (
            Edit(
                SPOOL + "log.py",
                "            if not isinstance(value, bytes) or crc_of_state(key, value) != crc:\n                log",
                "            if not isinstance(value, bytes):\n                log",
            ),
        ),
        (TEST_MUSEUM + "test_a_mark_whose_bits_changed_is_not_believed_and_no_row_is_taken_twice",),
    ),
    Mutation(
        "marks-lost-with-their-entry",
        "One damaged entry, and everything that a node sends again is taken for new.",
        (
            Edit(
                SPOOL + "repair.py",
                "                marks.take((node, install, boot), first, last)\n",
                "                pass\n",
            ),
        ),
        (TEST_MUSEUM + "test_a_mark_whose_bits_changed_is_not_believed_and_no_row_is_taken_twice",),
    ),
    Mutation(
        "memory-instead-of-the-card-at-the-start",
        "edgeHub goes on in RAM where its store can't be opened, and says so in no status.",
        (
            Edit(
                SPOOL + "log.py",
                '            self.close()\n            raise SpoolFault(f"{self.path}: {advice(self.path, error)}")',
                '            self._db = sqlite3.connect(":memory:", isolation_level=None)\n'
                "            create(self._db)\n"
                "            return self._state()\n            raise error",
            ),
        ),
        (TEST_MUSEUM + "test_a_folder_that_cannot_be_used_is_an_error_and_no_spool_in_memory",),
        "fall back to RAM silently",
    ),
    Mutation(
        "memory-instead-of-the-card-that-fails",
        "A card that keeps no more writes, and a gateway that goes on taking.",
        (
            Edit(
                SPOOL + "__init__.py",
                "        return 0 if self._trouble else self.queue.room",
                "        return self.queue.room",
            ),
        ),
        (TEST_MUSEUM + "test_a_commit_that_fails_acknowledges_nothing_and_leaves_nothing_of_itself_on_the_card",),
        "fall back to RAM silently",
    ),
    Mutation(
        "memory-taken-for-a-card",
        "Kura's default store is a database in memory; a folder on a tmpfs is the same.",
        (Edit(SPOOL + "__init__.py", "card_keeps=not volatile)", "card_keeps=True)"),),
        (TEST_MUSEUM + "test_what_is_written_to_a_folder_in_memory_is_not_safe",),
        "fall back to RAM silently",
    ),
    Mutation(
        "generation-kept-after-a-restored-copy",
        "Two spools with one identity number their records alike.",
        (
            Edit(
                SPOOL + "log.py",
                'restored = bool(old) and old.get("file") != born(self.path)',
                "restored = False",
            ),
        ),
        (TEST_SPOOL + "test_a_restored_backup_is_a_new_generation_and_invents_no_gap",),
    ),
    # Time.
    Mutation(
        "seconds-for-milliseconds-in-the-ttl",
        "An hour in the configuration is 3.6 seconds in the spool.",
        (Edit(FIELDPOST + "gateway.py", "round(route.ttl_s * 1000)", "round(route.ttl_s)"),),
        (TEST_MUSEUM + "test_a_ttl_of_an_hour_is_an_hour",),
        "seconds taken for milliseconds in TTL",
    ),
    Mutation(
        "milliseconds-compared-with-seconds",
        "ThingsBoard's gateway never deleted anything: it compared seconds with milliseconds.",
        (
            Edit(
                SPOOL + "__init__.py",
                " and self.queue.age_ms() - at_ms > ttl:",
                " and (self.queue.age_ms() - at_ms) // 1000 > ttl:",
            ),
        ),
        (
            TEST_MUSEUM + "test_a_ttl_of_an_hour_is_an_hour",
            TEST_SPOOL + "test_ages_are_by_a_clock_that_no_setting_moves",
        ),
        "seconds taken for milliseconds in TTL",
    ),
    Mutation(
        "seconds-for-milliseconds-in-keep",
        "A week in the configuration is ten minutes on the card.",
        (Edit(FIELDPOST + "gateway.py", "keep_ms=round(spool.keep_s * 1000)", "keep_ms=round(spool.keep_s)"),),
        (TEST_MUSEUM + "test_a_keep_of_an_hour_is_an_hour",),
        "seconds taken for milliseconds in TTL",
    ),
    Mutation(
        "age-by-the-wall-clock",
        "The clock is set a year ahead, and all that is stored is too old.",
        (
            Edit(
                SPOOL + "queue.py",
                "        return self._age_base + self._clock.boottime_ms()",
                "        return self._clock.unix_ms()",
            ),
        ),
        (TEST_SPOOL + "test_ages_are_by_a_clock_that_no_setting_moves",),
        "order by wall clock",
    ),
    Mutation(
        "order-by-the-wall-clock",
        "Readings dated before the clock was set overtake all others, or are never found.",
        (Edit(SPOOL + "statements.sql", "ORDER BY place LIMIT ?4;", "ORDER BY since_ms LIMIT ?4;"),),
        (TEST_MUSEUM + "test_the_order_is_that_in_which_readings_were_taken_whatever_the_clock_said",),
        "order by wall clock",
    ),
    Mutation(
        "synced-dates-corrected-too",
        "A date that was right is moved by a step of the clock that it never saw.",
        (
            Edit(
                SPOOL + "queue.py",
                "        if reading.quality == Quality.ANCHORED or self.eras.is_synced(reading.era):\n",
                "        if reading.quality == Quality.ANCHORED:\n",
            ),
        ),
        (TEST_MUSEUM + "test_a_date_that_was_right_stays_when_its_neighbours_are_corrected",),
    ),
    # What goes out.
    Mutation(
        "given-up-after-n-tries",
        "OpenTelemetry's collector gives up after 300 s by default, EdgeX after a count: and deletes.",
        (
            Edit(
                FIELDPOST + "forward.py",
                "            except Unreachable as lost:\n                self._lost(lost)\n",
                "            except Unreachable as lost:\n                self._lost(lost)\n"
                '                self._tries = getattr(self, "_tries", 0) + 1\n'
                "                if self._tries > 5:\n                    return\n",
            ),
        ),
        (TEST_MUSEUM + "test_an_uplink_that_comes_back_after_many_attempts_gets_everything",),
        "give up after N tries",
    ),
    Mutation(
        "confirmation-awaited-for-ever",
        "pika#1332, mosquitto#2176: one PUBACK that never comes, and a bridge that runs and does not move.",
        (
            Edit(
                FIELDPOST + "uplinks/mqtt.py",
                "            async with asyncio.timeout(seconds):\n                answer = await waiter",
                "            async with asyncio.timeout(None):\n                answer = await waiter",
            ),
        ),
        (TEST_MUSEUM + "test_a_confirmation_that_never_comes_is_not_awaited_for_ever",),
    ),
    Mutation(
        "backfill-before-live",
        "After an outage of days the present comes last (united-manufacturing-hub#152, amplet2#38).",
        (
            Edit(
                SPOOL + "queue.py",
                "                if head - progress.live > self.routes[route].batch_readings:\n",
                "                if False:\n",
            ),
        ),
        (TEST_SPOOL + "test_after_an_outage_fresh_readings_go_first_and_history_follows_in_order",),
    ),
    Mutation(
        "backfill-takes-the-whole-window",
        "Fresh readings wait for a place among those of last week.",
        (Edit(FIELDPOST + "forward.py", "flying < max(1, window - 1) and", "flying < window and"),),
        (TEST_FORWARD + "test_history_is_marked_and_follows_what_is_fresh",),
        hangs=True,
    ),
    Mutation(
        "backfill-without-a-pace",
        "A drain that drowns the collector (amplet2#38); the setting asked for since 2019 in mosquitto#1359.",
        (
            Edit(
                FIELDPOST + "forward.py",
                "        return max(0.0, self._free_at - time.monotonic()) if self._per_s else 0.0",
                "        return 0.0",
            ),
        ),
        (TEST_FORWARD + "test_history_goes_at_the_pace_that_is_set",),
        hangs=True,
    ),
    Mutation(
        "ttl-not-in-memory",
        "Our own: what was still in the stage was sent however old it was.",
        (
            Edit(
                SPOOL + "__init__.py",
                "        if position >= stage.first and not (ttl and position < stage.committed):\n",
                "        if position >= stage.first:\n",
            ),
        ),
        (TEST_MUSEUM + "test_a_ttl_holds_for_readings_that_are_in_memory_as_well",),
    ),
    Mutation(
        "one-dead-uplink-blocks-the-others",
        "telegraf#16537: one dead output stops the intake of all.",
        (
            Edit(
                SPOOL + "queue.py",
                "            self.lanes[LaneName.BULK].head - bulk.next_live(),\n",
                "            min(self.lanes[LaneName.BULK].head, min(self.progress[other, LaneName.BULK].live\n"
                "                for other in self.routes) + 20) - bulk.next_live(),\n",
            ),
        ),
        (TEST_FORWARD + "test_one_dead_uplink_never_slows_another",),
        hangs=True,
    ),
    Mutation(
        "poison-batch-set-aside-whole",
        "telegraf#15741: one bad message, and its neighbours are discarded with it.",
        (Edit(FIELDPOST + "forward.py", "            if len(batch.readings) > 1:\n", "            if False:\n"),),
        (TEST_FORWARD + "test_a_poison_reading_is_set_aside_alone_with_the_far_sides_reason",),
    ),
    Mutation(
        "poison-reading-forgotten",
        "Refused messages that are confirmed and discarded, with nowhere to look at them.",
        (
            Edit(
                FIELDPOST + "forward.py",
                "                self._spool.set_aside(self.config.id, batch.readings[0], str(refused))\n",
                "",
            ),
        ),
        (TEST_FORWARD + "test_a_poison_reading_is_set_aside_alone_with_the_far_sides_reason",),
    ),
    # What is given up.
    Mutation(
        "gap-records-dropped-first",
        "The only witness of a loss goes before what it tells of.",
        (
            Edit(
                SPOOL + "retention.py",
                'await self._give_up(LaneName.BULK, "max_bytes")',
                'await self._give_up(LaneName.URGENT, "max_bytes")',
            ),
        ),
        (TEST_MUSEUM + "test_at_the_limit_rows_go_and_the_gap_records_of_before_stay",),
    ),
    Mutation(
        "ledger-entry-not-written",
        "What was given up can't be looked up.",
        (Edit(SPOOL + "queue.py", "        self._work.ledger.append((self._clock.unix_ms(), event))\n", ""),),
        (
            TEST_FORWARD + "test_a_poison_reading_is_set_aside_alone_with_the_far_sides_reason",
            TEST_SPOOL + "test_ages_are_by_a_clock_that_no_setting_moves",
        ),
    ),
    Mutation(
        "discard-not-told-upstream",
        "The far side sees a hole and can't tell a loss from a delay.",
        (
            Edit(
                SPOOL + "queue.py",
                "        self.lanes[LaneName.URGENT].put(record, self.age_ms())\n",
                '        if event.kind == "presence":\n'
                "            self.lanes[LaneName.URGENT].put(record, self.age_ms())\n",
            ),
        ),
        (TEST_SPOOL + "test_a_lane_gives_up_what_is_older_than_its_max_age",),
    ),
)
