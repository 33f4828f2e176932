//! vhost-remap: a vhost-user-blk backend that serves a guest's virtqueues straight out of shared guest
//! memory through a bad-sector remap engine. The guest sees a disk that heals; the host keeps the book.
//!
//! What is promised to users is in the README; this page is for those who read or change the code.
//!
//! # Bird's-eye view
//!
//! ```text
//!  QEMU, cloud-hypervisor, …                                 operator
//!      │ vhost-user socket     │ shared guest memory             │ control socket (HTTP/1.1)
//!  ┌───▼────────────┐   ┌──────▼───────────────┐        ┌────────▼─────────┐
//!  │ vhost:         │   │ vhost: workers       │        │ control: reports │
//!  │ protocol thread├──►│ chain → Request      │        │ and orders       │
//!  └────────────────┘   │ engine: Shard        │        └────────┬─────────┘
//!                       └──┬────────────────┬──┘                 │ messages
//!          operations with │       requests │ ▲ answers, fences, │
//!              the guest's │  that met      │ │ new views        │
//!                   memory │  trouble       ▼ │                  ▼
//!                          │        ┌─────────┴────────────────────┐
//!                          │        │ engine: Healer, one a volume │
//!                          │        │ map, table, ladders, flushes │
//!                          │        └──────┬───────────────────────┘
//!                          ▼               ▼
//!              device: io_uring, threads, disks in memory, faults by rule
//!                          │               │
//!                       primary          spare
//! ```
//!
//! A *primary* holds the guest's data, sector for sector. A *spare* holds metadata, and the *slots* that
//! take in *blocks* (4096 bytes) the primary no longer takes. Each worker thread has one
//! [`Shard`](engine::shard::Shard), which serves what needs no thought from an immutable
//! [`View`](engine::view::View) of the map. Everything else belongs to the one
//! [`Healer`](engine::healer::Healer) of the volume.
//!
//! # Layers
//!
//! `units, sync ← device, volume ← engine ← runtime ← vhost, control ← serve ← cli ← main`. A layer uses those
//! named in its row and no other; `tests/tidy.rs` reads this table.
//!
//! | layer | may use | what it is | what it may not know |
//! |---|---|---|---|
//! | [`units`] | | sectors, blocks, slots, time | anything |
//! | `sync` | | where threads meet: locks, channels, atomics, wake-ups; the standard library's, or a model checker's | anything |
//! | [`device`] | [`units`] `sync` | where operations go: io_uring, threads, a crash model, faults by rule | slots, maps, guests |
//! | [`volume`] | [`units`] | what is on disk and what it means: layout, table, map, superblocks, poison | that devices exist |
//! | [`engine`] | [`units`] `sync` [`device`] [`volume`] | shard, healer, opening and making volumes, as state machines | clocks, threads, system calls, protocols |
//! | [`runtime`] | [`units`] `sync` [`device`] [`volume`] [`engine`] | threads, clocks and mailboxes around the engine; what an operator can ask, as plain data | sockets, what a guest's request looks like |
//! | [`vhost`] | [`units`] `sync` [`device`] [`engine`] [`runtime`] | the vhost-user protocol, virtqueues in guest memory, requests out of chains | slots, maps, spares |
//! | [`control`] | [`units`] [`device`] [`engine`] [`runtime`] | HTTP on a Unix socket: server, client and what they say | queues, guests' memory |
//! | [`serve`] | [`units`] [`runtime`] [`vhost`] [`control`] | one served volume, put together and taken down in order | how any part works |
//! | [`cli`] | [`units`] [`device`] [`runtime`] [`control`] [`serve`] | what can be typed and how answers look | volumes, other than through a socket or `runtime` |
//! | `main` | [`runtime`] [`control`] [`cli`] | the program | everything else |
//!
//! # Codemap
//!
//! - [`device::Device`] is the trait with the contract of all I/O; [`device::buffer`] has the only types
//!   for foreign memory. [`device::open`] opens and locks; [`device::memory`] and [`device::fault`] are
//!   for tests, and for operators who want to see a disk fail.
//! - [`volume::layout`] says where things lie on a spare, [`volume::table`] is the map as stored,
//!   [`volume::map`] the map as used, [`volume::superblock`] identity, [`volume::sidecar`] poison and counters.
//! - [`engine::shard`] is the fast path, [`engine::healer`] has a file for each kind of rare work,
//!   [`engine::health`] judges by plain numbers, [`engine::scan`] has order, pace and window of a scanner's pass,
//!   [`engine::message`] is all they say to each other, [`engine::open`] makes and opens volumes.
//! - [`runtime::volume`] makes, opens and closes, [`runtime::handover`] takes and gives away; [`runtime::healer`] is
//!   the healer's thread;
//!   [`runtime::worker`] is what a worker is given; [`runtime::handle`] answers operators.
//! - [`vhost::ring`], [`vhost::chain`] and [`vhost::request`] turn guest memory into
//!   [`Request`](engine::request::Request)s, [`vhost::inflight`] is what survives us,
//!   [`vhost::dirty`] what a migration has to copy again, [`vhost::worker`] the
//!   loop of a worker thread, [`vhost::protocol`] and `vhost::session` the thread that talks to the front-end.
//!   [`vhost::framework`] serves the same device with rust-vmm's daemon and rings in place of ours, to be compared.
//! - [`runtime::counters`] is what threads count, [`runtime::stats`] what is made of it.
//! - [`control::api`] is the documents, `control::routes` the addresses, `control::access` who may use them,
//!   [`control::metrics`] what Prometheus reads, `control::page` what browsers show, [`control::client`] what `cli`
//!   uses. `cli::top` draws the same on a terminal.
//!
//! # Invariants
//!
//! Most are absences:
//!
//! - Nothing in [`units`], [`volume`] and [`engine`] reads a clock, starts a thread, opens a file or
//!   depends on a hash's order: a run of the engine is a function of its arguments.
//! - [`device`] and [`volume`] do not know each other; only [`engine`] brings bytes and meaning together.
//! - No word of virtio occurs below [`vhost`], and slots do not occur in it.
//! - No shard takes a lock, allocates for a plain request, or waits for the healer.
//! - Nothing but the flush coordinator and opening code flushes, and a flush that failed is not repeated.
//! - Nothing but the committer writes table pages, and it never writes the newest durable copy of one.
//! - No request is in two places: every message that carries one moves it, and dropping one is a bug that
//!   [`Shard::unanswered`](engine::shard::Shard::unanswered) shows.
//! - No memory is given back before the kernel has let go of it: there is no cancel anywhere.
//! - Guest memory is never borrowed as a slice, and no byte of it is read twice to decide something.
//! - Control sockets never wait for a disk, except in threads of their own and by message.
//!
//! # The life of a request
//!
//! **Fast.** A kick wakes the worker's reactor. [`vhost::ring`] takes a head, [`vhost::chain`] copies and
//! checks the chain, [`vhost::request`] makes a [`Request`](engine::request::Request) whose
//! [`Iovecs`](device::buffer::Iovecs) point into guest memory. The shard sees that its blocks are plain and
//! not fenced, and emits one operation on the primary. Its completion becomes an
//! [`Answer`](engine::request::Answer); the worker writes the status byte and the used entry, once for a
//! batch. A request over remapped blocks is cut into runs, each an operation on primary or spare.
//!
//! **Trouble.** An operation fails, or a block is pending, or has lost sectors: the shard hands the request
//! over. The healer asks what the error means (a bad medium, a gone device, no space, our own fault),
//! *fences* the blocks in all shards, and climbs a ladder. Reads: retry, split to single sectors, else fail
//! for exactly what cannot be read. Writes: copy the guest's data once, rewrite in place and read back, else
//! move the block. Then it publishes a new view and lifts the fence in one message, and hands the request back.
//!
//! **Commit.** To move a block: allocate a slot, write it whole, flush the spare, write the table page's
//! other home in both places, flush, move the anchor, publish, answer. Commits that come meanwhile go into
//! the next one together. A failure in between leaves the commit *in doubt*: its blocks answer with errors
//! until a later sequence is durable.
//!
//! # Promises and the tests that hold them
//!
//! Most of all `every_run_keeps_the_contract` (`tests/sim`): shards, healer and two faulty disks in one
//! thread, crashed and reopened, against a model of what each sector may be. Its model has tests of its own.
//! Beside it, `every_operation_fails_and_is_where_the_power_goes_in_turn` goes through a table of
//! scenarios with the same disks and model, one operation after the other.
//! `tests/process` drives the program over its sockets and compares its two transports,
//! `tests/conformance.rs` drives all devices, `tests/hostile_chains.rs` a worker.
//! `vhost::interleavings` runs the server's threads under a model checker, which decides who goes on; `sync` says
//! what threads share. `ci/test tsan` and `ci/test miri` look for data races and for what is undefined.
//! `tests/torture` kills the program at work, again and again (`make torture`), and reads all of it back.
//! `tests/metadata` damages, tears and interrupts all that is on the disks beside data, and holds golden images.
//! A part that nothing tests is called *not yet*. `tests/process/predecessor*.rs` have a test for each row of
//! dm-remap's operator contract.
//! `tests/fuzz` has fuzz targets for chains, metadata, messages and control; `tests/fuzz_smoke.rs` runs what they
//! run over their seeds and mutations of them.
//!
//! | promise | in short | held by |
//! |---|---|---|
//! | R1 | a read is the last completed write, or fails | `every_run_keeps_the_contract` `requests_of_all_sizes_around_remapped_blocks_agree_with_a_model` `all_sizes_and_alignments_read_back_with_io_uring` `a_file_that_shrank_gives_errors_and_not_zeros` `random_requests_faults_and_restarts_agree_with_a_model` `a_primary_whose_file_was_cut_fails_exactly_what_is_missing`; without the spare: `blocks_remapped_after_the_list_was_written_read_as_the_primary_holds_them` `an_interrupted_stamp_leaves_a_whole_list_or_none_to_go_by` `an_interrupted_adoption_leaves_no_new_volume_beside_an_old_label` `a_label_whose_list_is_half_written_is_not_gone_by` `a_home_that_gave_nothing_is_older_than_what_the_volume_went_on_with` `a_superblock_that_gave_nothing_is_older_than_the_one_the_volume_went_on_with` `with_a_dirty_log_only_a_region_that_goes_along_keeps_requests` `a_guest_of_cloud_hypervisor_uses_the_disk` `what_the_guest_wrote_where_the_label_was_outlives_the_last_superblock` `what_an_attempt_has_left_does_not_come_to_light_with_the_next_one` `a_volume_grows_into_room_that_it_has` `a_map_that_has_grown_takes_new_blocks_and_keeps_the_old_ones` |
//! | R2 | a failing read fails for exactly its bad sectors, within bounds | `a_read_of_a_bad_block_fails_for_exactly_its_sectors` `a_read_of_a_disk_that_tries_hard_fails_within_ten_seconds_of_device_time` `a_long_read_of_a_slow_disk_that_reads_in_the_end_succeeds` `an_unreadable_block_is_an_error_for_itself_only_until_it_is_rewritten` |
//! | R3 | pending blocks no later success; lost sectors heal | `a_pending_block_is_healed_in_place_by_a_rewrite` `every_run_keeps_the_contract` `a_lost_sector_is_not_served_from_a_stale_primary` `a_sector_lost_from_a_slot_is_not_looked_for_on_the_primary` `lost_sectors_that_read_again_are_kept_in_the_slot_beside_newer_ones` `a_pass_counts_lost_sectors_and_heals_those_that_read_again` `a_pass_reads_pending_blocks_again` |
//! | R4 | a read error takes no slot and loses nothing | `a_read_of_a_bad_block_fails_for_exactly_its_sectors` `a_pass_finds_what_does_not_read_and_reads_around_it_at_once` |
//! | W1 | a failed write is rewritten in place, or moved | `a_write_that_fails_once_is_rewritten_in_place` `a_block_that_fails_a_read_again_after_a_rewrite_moves_with_the_next_write` `a_write_gives_up_rewriting_in_place_within_two_seconds_of_device_time` `a_write_to_a_bad_block_succeeds_and_moves_the_block` `a_guest_boots_from_its_disk_and_its_root_file_system_does_not_notice_bad_blocks` `a_guest_boots_by_uefi_from_blocks_that_have_moved` `a_block_rewritten_in_place_is_healed_once_a_pass_has_read_it` `a_block_rewritten_in_place_is_flushed_and_then_read_back` `what_reads_back_differently_was_not_written` |
//! | W2 | slot, flush, map, flush, publish, answer | `every_run_keeps_the_contract` `a_second_commit_waits_for_the_second_home_of_the_first` |
//! | W3 | no answer before the mapping is durable `every_operation_fails_and_is_where_the_power_goes_in_turn`; storms share commits | `a_second_commit_to_a_page_never_endangers_the_first` `remaps_survive_a_kill` `what_was_answered_survives_every_kill` `sixty_four_blocks_failing_at_once_are_all_moved` `concurrent_failures_of_one_block_take_one_slot` |
//! | W4 | a partial write merges, and loses only what cannot be read | `a_partial_write_loses_exactly_the_sectors_that_cannot_be_read` `a_sector_written_to_an_unreadable_block_loses_exactly_its_unreadable_neighbours` |
//! | W5 | healing works from one copy and overwrites nothing newer | `every_run_keeps_the_contract` `no_worker_uses_an_old_map_after_a_fence` `a_write_to_lost_sectors_that_are_being_found_again_stays` `a_slot_that_is_read_again_is_not_given_to_another_block_meanwhile` |
//! | W6 | zeroing is a write, discard skips, release verifies | `zeroing_several_ranges_over_remapped_blocks_leaves_zeros` `a_discard_skips_remapped_and_pending_blocks` `blocks_are_moved_and_moved_back_by_hand` `a_discard_passes_over_blocks_that_are_not_plain` |
//! | W7 | a failed write leaves each sector old or new | `every_run_keeps_the_contract` `a_failed_write_is_old_or_new_until_it_is_read` |
//! | W8 | a commit in doubt is neither used nor undone | `every_run_keeps_the_contract` `metadata_that_cannot_be_written_anywhere_fails_the_write` `a_commit_that_failed_half_way_is_old_or_new_after_a_restart` `a_commit_in_doubt_fails_its_block_until_the_spare_is_back` `a_commit_in_doubt_is_decided_once_by_a_restart` `every_operation_fails_and_is_where_the_power_goes_in_turn` `the_slot_of_a_commit_in_doubt_is_left_alone` `a_doubt_ends_with_the_poison_that_came_with_it` |
//! | F1 | a flush covers all that was answered, on both devices | `every_run_keeps_the_contract` `write_through_follows_the_driver` `a_power_cut_takes_what_no_flush_has_covered` `a_driver_without_flush_gets_each_write_flushed` `a_flush_reaches_both_devices` `a_flush_covers_what_another_queue_was_told_is_written` `write_through_outlives_the_process` `what_the_driver_chose_outlives_a_reset` `a_driver_that_chose_write_through_has_it_after_a_reset_and_a_kill_of_the_server` `write_through_goes_with_the_guest` |
//! | F2 | a failed flush poisons until the operator has looked | `a_failed_flush_poisons_the_volume_until_the_operator_has_looked` `a_poison_that_no_device_keeps_is_called_not_persistent` `a_poisoned_volume_does_not_close_cleanly` `a_flush_that_fails_at_opening_poisons_and_forgets_no_earlier_note` `a_real_flush_error_poisons_the_volume_until_it_is_cleared` `every_operation_fails_and_is_where_the_power_goes_in_turn` `a_note_that_only_the_label_had_is_not_forgotten_with_it` `the_note_of_a_flush_that_failed_at_opening_is_durable_wherever_it_is_taken` `a_clearing_counts_when_a_device_took_it_and_only_then` `a_note_of_a_failed_flush_is_durable_once_it_was_read` `nobody_is_told_of_a_failed_flush_before_the_note_of_it_is_written` `the_note_of_a_failed_flush_is_written_when_no_flush_of_its_device_is_under_way` `a_poisoning_is_noted_when_the_last_shard_has_heard_of_it` `a_write_that_waited_at_the_healer_when_the_volume_was_poisoned_is_not_begun` `a_write_that_was_parked_at_a_fence_when_the_volume_was_poisoned_is_not_begun` `a_spare_that_is_back_waits_for_a_flush_that_is_under_way` `a_note_goes_to_every_label_that_may_count` `an_attempt_that_may_count_is_overtaken_before_its_label_goes` `what_was_written_is_known_while_a_volume_grows` `a_clearing_is_for_the_note_that_was_seen` `a_poisoned_volume_is_looked_at_and_not_touched` |
//! | F3 | a clean spare that fails is down `a_spare_that_really_answers_only_errors_is_down_until_it_answers_again`; the primary goes on | `a_spare_that_fails_to_flush_while_clean_is_down_and_the_primary_goes_on` `a_spare_that_fails_to_flush_while_dirty_poisons_the_volume` `a_lost_spare_costs_only_remapped_blocks_until_it_is_back` `a_write_that_a_failed_flush_may_have_lost_is_not_answered_as_done` `a_commit_that_waited_until_the_spare_was_down_is_refused` `a_write_that_waited_until_the_spare_was_down_does_not_touch_its_slot` |
//! | O1 | a crash at any point leaves what R1 admits | `every_run_keeps_the_contract` `two_ends_of_any_kind_leave_a_whole_superblock_in_the_label` `remaps_survive_a_kill` `ten_runs_after_each_other_lose_nothing` `a_kill_in_the_middle_of_moving_blocks_loses_nothing_that_was_answered` `a_torn_group_commit_leaves_each_page_old_or_new` `an_interrupted_opening_is_taken_up_by_the_next_one` `an_interrupted_close_loses_nothing` `a_kill_at_each_step_of_moving_a_block_leaves_the_old_map_or_the_new` `every_operation_fails_and_is_where_the_power_goes_in_turn` `what_was_answered_survives_every_kill` `the_newest_of_a_page_is_in_two_places_before_its_other_homes_are_rewritten` `a_place_that_counts_again_is_whole_by_then` `pages_that_a_failed_flush_dropped_are_durable_before_older_ones_are_overwritten` `a_second_home_that_a_failed_flush_dropped_is_not_taken_for_the_durable_one` `a_superblock_that_a_failed_flush_dropped_is_durable_before_the_older_one_is_overwritten` `two_places_that_fail_at_a_time_are_not_retired_each_by_the_other` `a_volume_that_grows_is_old_or_new_after_a_crash_at_any_moment` `a_volume_grows_in_the_order_that_loses_nothing` `a_resize_that_the_spare_does_not_take_leaves_a_disk_that_opens` `a_disk_grows_under_its_guest_which_is_told` `a_guest_sees_its_disk_grow_also_after_the_server_was_killed` `a_disk_grows_again_and_again_while_it_is_used` `an_old_label_is_believed_only_beyond_the_capacity` `a_label_that_moves_lies_behind_the_old_one` `the_power_may_go_while_a_damaged_copy_is_written_anew` |
//! | O2 | a slot serves one block, and is free only when that is durable | `every_slot_is_given_out_once_and_counts_agree` `the_later_incarnation_wins_also_across_the_wrap` `every_run_keeps_the_contract` `a_release_waits_until_the_slot_that_its_block_left_is_retired` `nothing_is_released_while_the_slot_that_its_block_left_is_not_recorded` |
//! | O3 | a killed backend comes back unnoticed | `with_a_region_they_stay_there_and_are_resubmitted_once` `a_crash_between_publishing_and_clearing_loses_and_repeats_nothing` `a_crash_before_publishing_repeats_the_batch` `a_server_killed_again_and_again_under_a_guest_is_not_noticed` `there_is_nothing_to_connect_to_before_the_volume_is_open` `what_was_answered_survives_every_kill` `a_connection_that_is_made_while_no_server_runs_is_served_by_the_next` `each_front_end_gets_the_answers_it_waits_for_and_its_guest_the_disk` `a_guest_is_migrated_with_its_volume_and_back` `a_volume_goes_with_its_guest_and_comes_back` `a_newer_program_takes_over_from_the_server_of_a_running_guest` `a_kill_at_any_access_to_a_split_ring_loses_and_repeats_nothing` `a_kill_at_any_access_to_a_packed_ring_loses_and_repeats_nothing` `a_kill_during_recovery_loses_and_repeats_nothing` `answers_that_a_dead_process_had_not_shown_are_not_seen` `requests_come_back_in_the_order_they_were_taken_with_their_descriptors` `a_driver_that_begins_anew_finds_a_region_that_has_forgotten_it` `a_server_killed_under_a_guest_with_packed_rings_is_not_noticed` `a_ring_that_has_gone_round_is_not_taken_for_a_new_one` |
//! | O4 | nothing is answered before the kernel is done; one owner at a time | `a_dropped_reactor_has_let_go_of_memory_and_locks` `a_stop_with_requests_under_way_closes_cleanly` `a_successor_gets_the_lock_once_the_holder_is_gone` `qemu_and_we_keep_each_other_out` `a_volume_has_one_server` `a_worker_that_is_told_to_end_lets_go_of_everything` `a_volume_closes_cleanly_while_requests_and_orders_are_under_way` `what_was_answered_survives_every_kill` `what_qemu_writes_is_left_alone` `a_block_device_in_use_is_left_to_those_who_use_it` `a_guest_that_comes_too_early_is_turned_away` `a_disk_that_has_grown_is_shown_as_large_to_the_next_front_end` `a_guest_whose_workers_cannot_be_started_may_come_again` `a_pass_ends_with_its_server` |
//! | O5 | stops and memory removal wait for the kernel, and only for it | `a_stop_waits_for_the_device_and_shows_the_answers` `a_stop_rewinds_the_ring_over_parked_requests` `a_stop_without_a_region_answers_what_is_held` `memory_goes_when_the_requests_into_it_have_ended` `a_reset_forgets_what_was_parked` `a_write_left_behind_by_a_front_end_does_not_land_in_the_next_session` `a_request_that_hangs_is_named_and_holds_nobody_up` `a_drain_ends_and_nothing_is_taken_after_it` `a_drain_gets_its_requests_back_from_the_healer` `memory_that_was_given_back_is_used_by_nobody` `a_stop_answers_what_is_held` `each_front_end_gets_the_answers_it_waits_for_and_its_guest_the_disk` `a_shutdown_waits_for_no_front_end_that_stops_halfway` `a_stop_is_answered_when_a_slow_disk_has_returned_the_request` `memory_is_given_back_when_a_slow_disk_has_read_into_it` `a_reset_is_answered_when_a_slow_disk_has_returned_the_request` `the_next_front_end_is_served_when_a_slow_disk_has_returned_the_last_one_s_request` `with_a_dirty_log_only_a_region_that_goes_along_keeps_requests` `a_stop_leaves_what_is_held_in_a_region_that_goes_along` `a_stop_answers_what_is_held_if_the_region_does_not_go_along` |
//! | E1 | errors are told apart; a gone device remaps nothing | `a_lost_primary_fails_requests_and_comes_back_by_itself` `a_primary_that_answers_eio_to_everything_is_gone` `a_primary_that_goes_right_after_a_probe_is_gone_and_not_full_of_bad_sectors` `a_storm_of_failed_writes_trips_the_breaker_until_the_operator_clears_it` `bad_areas_far_apart_that_are_hit_at_once_are_no_lost_device` `no_space_fails_only_that_write` `held_requests_go_on_when_the_primary_is_back` `each_real_error_of_the_medium_moves_the_block` `each_real_error_of_a_gone_device_opens_the_breaker` `a_full_file_system_under_the_primary_fails_only_first_writes` `a_primary_whose_daemon_was_killed_is_gone_and_nothing_is_lost` `a_device_that_went_before_its_writes_failed_comes_back_by_itself` `probes_read_a_place_that_takes_its_time_once_at_a_time` `nothing_is_pending_for_a_device_that_goes_during_a_read` `a_known_block_whose_read_ends_when_the_device_is_back_is_not_weak` |
//! | E2 | a full spare fails only what needs a slot | `a_full_spare_fails_only_writes_that_need_a_slot` `a_write_held_by_a_full_spare_goes_on_when_a_slot_is_free` `a_filling_spare_is_announced_however_fast_it_fills` `a_guest_is_told_how_far_the_spare_is_used` `the_lifetime_follows_the_use_of_the_reserve_and_fills_what_fits` `a_full_spare_costs_ext4_only_the_writes_that_need_a_slot` `writes_held_by_a_full_spare_go_on_when_blocks_are_released` `blocks_stay_in_failing_slots_where_few_are_free` |
//! | E3 | a slot that fails writes is retired | `every_run_keeps_the_contract` `a_block_moves_past_slots_that_do_not_take_it` `a_block_whose_slot_fails_moves_to_another_slot` `a_slot_that_does_not_read_fails_exactly_its_sectors_and_loses_nothing` `a_slot_that_really_takes_no_writes_is_retired_and_another_is_taken` `a_slot_that_failed_is_retired_when_the_trouble_is_over` `a_block_whose_slot_needs_retries_moves_to_another_one` |
//! | E4 | what does not fit is refused, nothing is overwritten | `a_table_page_without_a_good_home_keeps_the_volume_from_opening` `one_good_home_of_a_table_page_is_enough` `what_cannot_serve_is_refused_with_the_reason` `wrong_devices_are_refused` `devices_that_changed_while_nobody_looked_are_refused` `an_older_spare_is_refused` `a_label_that_is_not_whole_is_not_gone_by` `nothing_is_made_over_something_that_exists` `any_one_damaged_copy_is_repaired_from_the_others` `any_two_damaged_copies_after_a_crash_are_repaired_or_refused` `with_no_whole_copy_left_the_volume_is_refused_or_poisoned` `a_label_tells_an_older_spare_from_a_damaged_one` `an_interrupted_creation_leaves_nothing_or_a_complete_empty_volume` `a_creation_over_an_old_volume_never_leaves_half_of_the_old_one` `a_volume_of_a_later_format_is_refused` `a_volume_with_incompatible_features_is_refused` `a_volume_with_read_only_compatible_features_is_only_read` `renamed_swapped_and_copied_halves_are_known_again` `create_refuses_what_cannot_become_a_volume` `serve_refuses_what_is_no_volume` `without_space_nothing_is_left_behind` `devices_in_use_are_left_to_those_who_use_them` `damaged_metadata_is_refused_or_opened_in_the_same_way_again` `what_comes_back_in_place_of_the_spare_is_not_used` `an_order_under_way_goes_no_further_when_the_volume_is_closed` `a_target_with_another_map_refuses_the_guest` `a_guest_may_come_to_a_server_that_has_opened_its_volume` `a_spare_from_before_the_volume_grew_is_refused` `a_close_in_the_midst_of_a_resize_looks_at_the_primary_last` `a_resize_that_the_primary_does_not_take_leaves_the_disk_as_it_was` `a_primary_that_was_extended_while_nobody_looked_opens_as_it_was_and_can_be_used` `a_volume_that_cannot_grow_says_why_and_stays_as_it_is` `what_cannot_grow_is_refused` `an_adopted_disk_and_one_without_metadata_grow_too` `a_disk_grows_into_a_device_that_was_extended` `nothing_is_written_to_the_primary_once_a_close_has_looked_at_it` |
//! | E5 | no guest input panics, hangs or escapes its memory | `broken_structures_come_back_empty` `requests_that_cannot_be_served_fail` `a_ring_that_lies_stops_until_it_is_restarted` `nonsense_in_the_region_is_survived` `requests_beyond_the_end_or_not_in_sectors_are_refused_and_change_nothing` `both_transports_answer_every_request_alike` `no_ring_that_lies_ends_the_server` `everything_at_once_ends_well` `what_a_guest_writes_is_not_taken_for_a_superblock` `no_chain_of_a_guest_panics_hangs_or_writes_where_it_may_not` `a_front_end_that_talks_nonsense_leaves_the_server_as_it_was` `a_kick_that_nobody_can_wait_for_is_refused` `a_front_end_with_one_message_at_fault_is_refused_or_leaves_and_nothing_of_it_stays` `a_front_end_that_stops_in_the_middle_of_a_message_is_cut_off` `a_front_end_that_reads_no_answers_leaves_nothing_when_it_goes` `broken_lists_of_a_packed_ring_come_back_empty` `a_packed_ring_that_lies_stops_until_it_is_restarted` `a_chain_without_end_is_refused` `a_driver_that_offers_what_the_device_holds_is_refused` `buffer_ids_are_any_number_and_each_is_held_once` `nonsense_in_the_region_is_refused` `a_front_end_is_told_when_its_queues_are_started_again` `a_front_end_without_a_channel_sees_the_new_size_when_it_asks` `a_front_end_that_does_not_read_is_not_waited_for` `each_front_end_is_told_once_its_queues_are_started` `a_disk_that_has_grown_shows_its_new_capacity` |
//! | P1 | each error a guest gets has an event | `every_run_keeps_the_contract` `a_full_spare_fails_only_writes_that_need_a_slot` `requests_beyond_the_end_or_not_in_sectors_are_refused_and_change_nothing` `a_flood_of_events_is_logged_in_part_and_says_so` `stats_count_what_the_guest_did` `a_request_under_way_and_then_its_latency_are_seen` `a_change_of_health_is_told_once_with_the_rule_and_the_numbers` `health_follows_what_happens_and_says_why` `each_rule_holds_from_its_limit_on` `what_failed_on_a_day_is_remembered_over_restarts_and_forgotten_after_70_days` `the_days_are_kept_with_the_counters_and_what_others_keep_there_stays` `cleared_counters_begin_anew_and_the_lifetime_and_the_days_go_on` `metrics_are_what_stats_say_and_promtool_finds_nothing_wrong_with_them` `alerts_fire_on_what_they_are_for` `alerts_name_metrics_that_there_are` `the_port_takes_only_reads_and_only_under_its_own_names` `members_of_the_control_group_read_and_give_no_orders` `the_committed_schema_is_that_of_the_documents` `real_answers_fit_the_committed_schema` `log_lines_are_json_objects_where_that_is_wanted` `a_hook_runs_for_each_wanted_event_also_after_a_restart` `systemd_hears_that_the_server_is_ready_and_alive_and_stops` `a_slow_disk_does_not_keep_the_server_from_saying_that_it_is_alive` `a_server_with_a_thread_that_hangs_does_not_say_that_it_is_alive` `the_page_shows_what_the_server_says_and_when_it_is_gone` `the_page_is_used_by_keyboard_on_a_narrow_screen_in_the_dark` `the_page_may_load_nothing_and_be_framed_by_nobody` `top_follows_the_volume_and_leaves_the_terminal_as_it_was` `top_gives_the_terminal_back_also_when_it_is_told_to_end` `a_change_of_one_device_is_told_with_its_name_also_where_the_volume_stays_as_it_is` `what_the_spare_does_is_not_put_down_to_the_primary` |
//! | P2 | lost sectors are counted and listed; healed means proven | `a_partial_write_loses_exactly_the_sectors_that_cannot_be_read` `the_file_on_a_lost_sector_of_ext4_is_named_and_metadata_is_not_called_a_file` `the_file_on_a_lost_sector_of_xfs_is_named_and_metadata_is_not_called_a_file`; export: not yet `a_scratch_is_seen_on_the_surface_in_letters_numbers_and_as_a_picture` `a_pass_finds_200_bad_50_slow_and_20_lost_places` `a_pass_beside_a_guest_finds_the_same_and_the_guest_gets_what_it_wrote` `a_pass_that_only_looks_leaves_everything_as_it_is` `a_pass_goes_on_where_it_was_when_its_server_is_started_again` `what_was_skipped_is_listed_and_an_error` `a_pass_reads_every_block_and_slot_and_all_metadata_and_writes_nothing` `a_place_that_nobody_lives_in_may_fail_or_be_given_back` `a_pass_over_a_slot_ends_although_its_block_went_back_to_a_weak_place` `a_disk_full_of_zeros_has_no_suspects` `weak_blocks_move_while_they_can_be_read_if_that_is_wanted_and_no_more_than_a_share` `a_block_that_reads_only_when_it_is_examined_counts_as_recovered` `a_pass_skips_a_block_in_doubt` `a_weak_block_that_reads_no_more_when_it_is_to_move_stays_and_loses_nothing` `of_weak_blocks_64_move_on_a_day` `a_paused_pass_keeps_its_place_over_a_restart` `a_pass_that_a_kill_interrupts_goes_on_by_itself` `passes_begin_when_they_are_due_and_go_on_in_their_window` `a_pass_waits_for_a_device_that_is_gone` `a_block_that_takes_the_device_away_is_left_alone_after_some_times` `of_a_device_that_goes_for_a_block_only_that_block_is_left_out` `blocks_that_failed_while_the_device_was_gone_are_not_weak` `a_block_whose_read_ends_when_the_device_is_back_is_not_weak` `the_label_of_a_device_that_goes_is_left_alone` `a_label_that_takes_its_device_away_is_left_alone_after_some_times` `a_label_that_takes_no_writes_is_told_of_once` `a_slow_block_that_fails_when_it_is_read_again_is_bad` `a_rewritten_block_that_reads_after_retries_is_not_healed` `weak_blocks_leave_a_quarter_of_the_slots_free` `a_pass_ends_when_it_has_given_two_days_to_what_fails` `a_rewrite_of_another_block_does_not_begin_a_block_anew` `each_damaged_copy_is_found_and_all_but_the_spares_superblocks_and_notes_are_written_anew` `a_copy_that_does_not_read_is_written_anew` `only_looking_leaves_a_damaged_copy` `a_page_that_is_being_written_is_not_called_damaged` `a_place_that_goes_during_a_pass_does_not_end_it_early` `a_pass_that_skipped_something_does_not_count` `a_damaged_anchor_is_written_anew_once_the_other_home_is_durable` |

pub mod cli;
pub mod control;
pub mod device;
pub mod engine;
pub mod runtime;
pub mod serve;
mod sync;
pub mod units;
pub mod vhost;
pub mod volume;
