"""Small faults in this package, one behaviour each, for ``find_faults.py``.

The same behaviours as in the list with which the tests before the last rewriting were measured. Where a
mechanism is gone, the nearest fault of the same kind is in its place, and its description says so.
"""

from __future__ import annotations

FAULTS: list[dict[str, object]] = []


def add(
    name: str, room: str, kind: str, description: str, file: str, old: str, new: str, *tests: str
) -> None:
    """Add one fault; the arguments are the fields of ``find_faults.Fault``."""
    entry = {"name": name, "room": room, "kind": kind, "description": description, "file": file}
    FAULTS.append({**entry, "old": old, "new": new, "tests": tests})


# -- losses ----------------------------------------------------------------------------------------

add(
    "loss of V: sign of the error",
    "losses",
    "sign",
    "The expectile loss of V gets V minus Q in place of Q minus V, so that V follows the worse "
    "actions.",
    "losses/loss.py",
    "            loss = F.expectile_loss(target_qvalue - value, expectile=self.expectile)",
    "            loss = F.expectile_loss(value - target_qvalue, expectile=self.expectile)",
    "losses/test_objectives.py",
)
add(
    "target of V: mean of the critics",
    "losses",
    "wrong reduction",
    "V regresses on the mean over the target critics in place of their minimum.",
    "losses/loss.py",
    "return self.action_values(batch, TARGET_CRITICS).amin(0)",
    "return self.action_values(batch, TARGET_CRITICS).mean(0)",
    "losses/test_objectives.py",
)
add(
    "target of V: live critics",
    "losses",
    "wrong parameters",
    "Advantages and the loss of V take the live critics in place of the target critics.",
    "losses/loss.py",
    "return self.action_values(batch, TARGET_CRITICS).amin(0)",
    "return self.action_values(batch, LIVE_CRITICS).amin(0)",
    "losses/test_objectives.py",
    "update/test_step.py",
)
add(
    "targets of the critics: gradient reaches V",
    "losses",
    "omitted no_grad",
    "The regression targets of the critics are computed with gradients, so the critics' loss "
    "trains V.",
    "losses/loss.py",
    "        estimator = self.value_estimator\n        with torch.no_grad():",
    "        estimator = self.value_estimator\n        with torch.enable_grad():",
    "losses/test_objectives.py",
)
add(
    "sequential order: gradient of the policy reaches V",
    "losses",
    "omitted no_grad",
    "In the sequential order V(s) in the advantage is computed with gradients, so that the "
    "policy's loss trains V.",
    "losses/loss.py",
    "        with torch.no_grad():\n            value = self.networks.value\n",
    "        with torch.enable_grad():\n            value = self.networks.value\n",
    "update/test_step.py",
    "losses/test_objectives.py",
)
add(
    "bootstrap ends at done",
    "losses",
    "wrong key",
    "The critics' targets stop at done, time limits included, in place of terminated.",
    "losses/loss.py",
    "for key in (keys.reward, keys.terminated)",
    "for key in (keys.reward, keys.done)",
    "losses/test_objectives.py",
)
add(
    "n-step rewards: discount of one step",
    "losses",
    "skipped branch",
    "Batches with rewards of n steps are discounted by gamma in place of gamma to the n.",
    "losses/loss.py",
    "gamma = gamma ** per_sample(steps, shape, keys.steps_to_next_obs)",
    "gamma = gamma * torch.ones_like(per_sample(steps, shape, keys.steps_to_next_obs))",
    "losses/test_rival_faults.py",
)
add(
    "importance weights unused",
    "losses",
    "omitted argument",
    "The importance weights of a prioritised buffer are read and not used.",
    "losses/loss.py",
    "            weight=batch.weight_like(loss),",
    "            weight=None,",
    "losses/test_rival_faults.py",
)
add(
    "priority of padding",
    "losses",
    "omitted write",
    "The squared TD error of masked steps is not set to 0.",
    "losses/loss.py",
    "            td_error = td_error.masked_fill(~mask, 0.0)",
    "            td_error = td_error.masked_fill(mask & ~mask, 0.0)",
    "losses/test_rival_faults.py",
    "losses/test_objectives.py",
)
add(
    "ddpg_bc trains the critics",
    "losses",
    "omitted detach",
    "The policy's loss ddpg_bc sends gradients into the critics' parameters.",
    "losses/loss.py",
    'Q_SOURCES = {"live": DETACHED_CRITICS,',
    'Q_SOURCES = {"live": LIVE_CRITICS,',
    "losses/test_ddpg_bc.py",
)
add(
    "ddpg_bc: gradient through the scale",
    "losses",
    "omitted detach",
    "The mean of |Q| by which ddpg_bc divides Q is not detached.",
    "losses/loss.py",
    "self.mean_of_run(q.detach().abs(), batch)",
    "self.mean_of_run(q.abs(), batch)",
    "losses/test_ddpg_bc.py",
)
add(
    "all losses train the encoder",
    "losses",
    "omitted detach",
    "With encoder_gradient='critics' the losses of the policy and of V train the encoder too.",
    "losses/parameters.py",
    "        if critics != TARGET_CRITICS and not learns:",
    "        if False:",
    "losses/test_encoder.py",
)
add(
    "flow: normal times",
    "losses",
    "wrong distribution",
    "The times of flow matching are drawn from a normal in place of a uniform distribution.",
    "losses/loss.py",
    "Draw(shape, False, None, self.among)",
    "Draw(shape, True, None, self.among)",
    "losses/test_flow.py",
)
add(
    "all critics start equal",
    "losses",
    "omitted draw",
    "Critics that are made of one module all start at its weights, so that their minimum is that "
    "of one.",
    "losses/critics.py",
    "        draws = list(flat[index].unflatten(-1, source.shape).unbind(0))",
    "        draws = [flat.unflatten(-1, source.shape)] * len(index)",
    "losses/test_critics.py",
)
add(
    "averaged policy is stale after a load",
    "losses",
    "stale state",
    "After load_state_dict the averaged policy acts with other tensors than the average that was "
    "loaded.",
    "losses/parameters.py",
    "            shared = nn.Parameter(average.get(key).data, requires_grad=False)",
    "            shared = nn.Parameter(average.get(key).data.clone(), requires_grad=False)",
    "losses/test_average.py",
)
add(
    "multi-step targets cross padding",
    "losses",
    "off by one",
    "Multi-step returns stop at the first padded step in place of the last real step before "
    "padding.",
    "losses/batch.py",
    "    ends[..., :-1] = ~mask[..., 1:]",
    "    ends[..., 1:] = ~mask[..., 1:]",
    "losses/test_objectives.py",
)
add(
    "priority is the mean error",
    "losses",
    "wrong reduction",
    "The priority of a sample is the mean of the critics' squared TD errors in place of the "
    "largest.",
    "losses/loss.py",
    'summary = {"priority": metadata["td_error"].amax(0)}',
    'summary = {"priority": metadata["td_error"].mean(0)}',
    "losses/test_objectives.py",
    "update/test_step.py",
)

# -- update ----------------------------------------------------------------------------------------

add(
    "sequential order: old V in the advantage",
    "update",
    "stale state",
    "In the sequential order the policy's weights use V(s) of before V's descent.",
    "update/step.py",
    "loss.actor_term(batch, target_qvalue - value)",
    'loss.actor_term(batch, target_qvalue - of_value["value"])',
    "update/test_step.py",
)
add(
    "gradients accumulate",
    "update",
    "stale state",
    "Gradients of the previous descent are not cleared before the backward pass.",
    "update/step.py",
    "                parameter.grad = None",
    "                parameter.grad = parameter.grad",
    "update/test_step.py",
)
add(
    "clipping raises small gradients",
    "update",
    "bound",
    "Gradients are scaled up to the limit where they are smaller, and not down where they are "
    "larger.",
    "update/step.py",
    "scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)",
    "scale = (limit / (square.sqrt() + 1e-6)).clamp(min=1.0)",
    "update/test_step.py",
)
add(
    "clipping by the largest tensor's norm",
    "update",
    "wrong reduction",
    "The norm of a network's gradient is the largest of its tensors' norms in place of the norm "
    "over all of them.",
    "update/step.py",
    "torch.stack([row.square().sum(-1) for row in rows]).sum(0)",
    "torch.stack([row.square().sum(-1) for row in rows]).amax(0)",
    "update/test_step.py",
)
add(
    "traced targets jump",
    "update",
    "sign",
    "In compiled updates the targets move by 1 - tau in place of tau.",
    "update/step.py",
    "            target.data.lerp_(parameter.data, 1 - eps)",
    "            target.data.lerp_(parameter.data, eps)",
    "update/test_capture.py",
)
add(
    "average of the policy does not move",
    "update",
    "omitted write",
    "The moving average of the policy's weights is not updated.",
    "update/step.py",
    "_polyak_step(self.averaged.targets, self.averaged.live,",
    "_polyak_step([], [],",
    "losses/test_average.py",
)
add(
    "schedulers do not step",
    "update",
    "omitted call",
    "An eager or compiled update does not step the learning rate schedulers.",
    "update/step.py",
    "            scheduler.step()\n        return metrics",
    "            pass\n        return metrics",
    "update/test_step.py",
)
add(
    "captured: settings of the loss are fixed",
    "update",
    "stale state",
    "A captured step does not notice that a setting of the loss, such as the temperature, was "
    "changed: the guards on the loss are dropped.",
    "update/captured.py",
    '{"guard_filter_fn": worth_checking}',
    "{\n"
    '            "guard_filter_fn": lambda guards: [\n'
    '                keep and "loss" not in guard.name\n'
    "                for keep, guard in zip(worth_checking(guards), guards, strict=True)\n"
    "            ]\n"
    "        }",
    "update/test_capture.py",
)
add(
    "captured: rates of the first update",
    "update",
    "stale state",
    "All updates of a captured call have the learning rates of its first update.",
    "update/captured.py",
    "self._update.rates.copy_(self._rates[number])",
    "self._update.rates.copy_(self._rates[0])",
    "update/test_capture.py",
)
add(
    "captured: the last row is never drawn",
    "update",
    "off by one",
    "Captured updates draw row numbers below rows - 1.",
    "update/captured.py",
    "torch.randint(rows.rows, self._index.shape,",
    "torch.randint(rows.rows - 1, self._index.shape,",
    "update/test_capture.py",
)
add(
    "captured: rows from the global generator",
    "update",
    "missing seed",
    "Captured updates draw row numbers from torch's global generator in place of the sampler's.",
    "update/captured.py",
    "self._index.shape, generator=rows.generator, out=self._index)",
    "self._index.shape, out=self._index)",
    "update/test_capture.py",
)
add(
    "captured: metrics are sums of all calls",
    "update",
    "stale state",
    "The sums of metrics are not set to zero at the beginning of a captured call.",
    "update/captured.py",
    "        self._sums.zero_()\n",
    "",
    "update/test_capture.py",
)
add(
    "Adam: epsilon inside the correction",
    "update",
    "wrong place",
    "Adam of compiled updates and populations adds epsilon before the bias correction of the root.",
    "update/adam.py",
    'average / (square.sqrt() / root + group["eps"])',
    'average / ((square.sqrt() + group["eps"]) / root)',
    "update/test_stacked_adam.py",
)
add(
    "Adam: a shared trunk is counted once",
    "update",
    "skipped branch",
    "In compiled updates a parameter that is reached by both descents has one step counted where "
    "it made two.",
    "update/adam.py",
    "added[i] += gradient is not None",
    "added[i] |= gradient is not None",
    "losses/test_encoder.py",
)
add(
    "compiled: freezing is not followed",
    "update",
    "stale state",
    "A compiled step goes on training parameters that were frozen after it was compiled.",
    "update/step.py",
    "        if flags != self._flags:",
    "        if self._flags is None:",
    "update/test_compilation.py",
)
add(
    "updater of another loss is accepted",
    "update",
    "omitted check",
    "IQLStep accepts a target updater that follows another loss.",
    "update/checks.py",
    "    if updater is not None and updater.loss_module is not loss:",
    "    if updater is not None and updater.loss_module is None:",
    "update/test_step.py",
)
add(
    "two ranks train apart in silence",
    "update",
    "bound",
    "An update without data_parallel is refused only in groups of more than two ranks.",
    "update/step.py",
    "        if ranks > 1:",
    "        if ranks > 2:",
    "update/test_update_checks.py",
)
add(
    "features of the old encoder",
    "update",
    "stale state",
    "In the sequential order with encoder_gradient='all' the second descent reads features of "
    "before the first one.",
    "update/step.py",
    '        if loss.encoder_gradient == "all":  # the encoder has moved too',
    "        if False:",
    "losses/test_encoder.py",
)

# -- population ------------------------------------------------------------------------------------

add(
    "all runs have the first run's settings",
    "population",
    "wrong index",
    "The settings of the loss that differ between runs are those of the first run for all of them.",
    "population/loss.py",
    "torch.tensor([float(getattr(x, name)) for x in losses], dtype=torch.float64)",
    "torch.tensor([float(getattr(first, name)) for _ in losses], dtype=torch.float64)",
    "population/test_population_loss.py",
)
add(
    "all runs have the first run's discount",
    "population",
    "wrong index",
    "All runs of a population have the discount of the first one.",
    "population/loss.py",
    "torch.stack([x.value_estimator.gamma.reshape(()) for x in losses])",
    "torch.stack([first.value_estimator.gamma.reshape(()) for _ in losses])",
    "population/test_population_loss.py",
)
add(
    "all runs have the first run's learning rates",
    "population",
    "wrong index",
    "All runs of a population have the learning rates of the first one.",
    "population/runs.py",
    "torch.tensor([getattr(c, field) for c in self.configs], dtype=torch.float64)",
    "torch.tensor([getattr(first, field) for _ in self.configs], dtype=torch.float64)",
    "population/test_population.py",
)
add(
    "every member is the first",
    "population",
    "wrong index",
    "The agent that is made of a run has the weights of the first run.",
    "population/loss.py",
    "leaf.data.copy_(params.get(key)[number].reshape(leaf.shape))",
    "leaf.data.copy_(params.get(key)[0].reshape(leaf.shape))",
    "population/test_population_loss.py",
)
add(
    "a loaded population draws other batches",
    "population",
    "stale state",
    "A population that was loaded from a file begins the stream of batches again from the seed.",
    "population/runs.py",
    '                population.sampler.load_state_dict(states["sampler"])',
    "                pass",
    "population/test_population.py",
)
add(
    "updates that fill no call are left out",
    "population",
    "skipped branch",
    "With compile, updates that do not fill a captured call are not made.",
    "population/runs.py",
    "        for _ in range(left):",
    "        for _ in range(0 if self.configs[0].compile else left):",
    "population/test_population.py",
)
add(
    "populations of any configs",
    "population",
    "omitted check",
    "Configs that differ in settings that all runs share, such as the widths, are not refused.",
    "population/runs.py",
    "            if not knob.per_run and first != other:",
    "            if False:",
    "population/test_population_refused.py",
    "population/test_population.py",
)
add(
    "clipping of all runs together",
    "population",
    "wrong dimension",
    "The gradients of all runs of a population are clipped by the largest of the runs' norms.",
    "update/step.py",
    "(square.sqrt() + 1e-6)",
    "(square.sqrt().amax() + 1e-6)",
    "population/test_population.py",
)

# -- agent -----------------------------------------------------------------------------------------

add(
    "agent acts without the average",
    "agent",
    "skipped branch",
    "With actor_ema an agent acts with the live weights in place of their average.",
    "agent/build.py",
    "    policy = loss.averaged_actor if config.actor_ema else actor",
    "    policy = actor",
    "losses/test_average.py",
    "agent/test_agent.py",
)
add(
    "initial weights do not follow the seed",
    "agent",
    "missing seed",
    "Initial weights are drawn from seed 0 in place of the config's seed.",
    "agent/build.py",
    "with private_random_numbers(config.seed,",
    "with private_random_numbers(0,",
    "agent/test_agent.py",
)
add(
    "discount does not reach the loss",
    "agent",
    "wrong default",
    "The loss of an agent has the discount 0.99 in place of the config's.",
    "agent/build.py",
    "    loss.make_value_estimator(gamma=config.discount)",
    "    loss.make_value_estimator(gamma=0.99)",
    "population/test_population.py",
    "agent/test_agent.py",
)
add(
    "polyak does not reach the targets",
    "agent",
    "wrong default",
    "The targets of an agent move by 0.005 in place of the config's polyak.",
    "agent/build.py",
    "        SoftUpdate(loss, tau=config.polyak),",
    "        SoftUpdate(loss, tau=0.005),",
    "agent/test_agent.py",
)
add(
    "V has the critics' learning rate",
    "agent",
    "wrong name",
    "V is trained with critic_lr in place of value_lr.",
    "agent/build.py",
    '    "value": "value_lr",',
    '    "value": "critic_lr",',
    "agent/test_agent.py",
)
add(
    "cosine rises again",
    "agent",
    "bound",
    "A cosine schedule goes on after its last update, so that the learning rate rises again.",
    "functional.py",
    "interval = min(update, updates) * intervals // updates",
    "interval = update * intervals // updates",
    "agent/test_agent.py",
    "test_functional.py",
)
add(
    "weight decay does not reach AdamW",
    "agent",
    "omitted argument",
    "The optimizer adamw has torch's default weight decay in place of the config's.",
    "agent/build.py",
    "torch.optim.AdamW(groups, weight_decay=decay, fused=True)",
    "torch.optim.AdamW(groups, fused=True)",
    "population/test_population.py",
    "agent/test_agent.py",
)
add(
    "V does not standardise",
    "agent",
    "omitted argument",
    "V reads observations as they are, without the first layer that policy and critics have.",
    "agent/networks.py",
    "networks.StateValue(features, preprocess=preprocess(), **values)",
    "networks.StateValue(features, **values)",
    "agent/test_agent.py",
)
add(
    "an export that acts differently is written",
    "agent",
    "omitted check",
    "An export is refused only where no action of the program agrees with the policy's.",
    "agent/export.py",
    ".clamp(min=1.0)).all()):",
    ".clamp(min=1.0)).any()):",
    "agent/test_agent.py",
    "agent/test_export.py",
)
add(
    "an export does not count from the start",
    "agent",
    "off by one",
    "An exported program gives discrete actions counted from 0 in place of the space's start.",
    "agent/export.py",
    "return action.reshape(-1).long() + start",
    "return action.reshape(-1).long()",
    "agent/test_export.py",
)
add(
    "the newest checkpoint in place of the best",
    "agent",
    "skipped branch",
    "Agent.load of a run's folder takes the newest checkpoint although there is a best one.",
    "agent/build.py",
    '            path = best if best.exists() else newest(path / "checkpoints")',
    '            path = newest(path / "checkpoints")',
    "agent/test_agent.py",
)
add(
    "shared files are not compared",
    "agent",
    "omitted check",
    "A dataset with as many but other episodes than the agent's is accepted for the card of a "
    "shared agent. (In place of: a shared file that differs from the manifest's digest is "
    "accepted; there is no manifest now.)",
    "agent/hub.py",
    "not np.array_equal(np.asarray(given), task.episodes):",
    "np.shape(given) != np.shape(task.episodes):",
    "agent/test_hub.py",
)

# -- trainers, checkpoints, files ------------------------------------------------------------------

add(
    "resume without the random generators",
    "trainers",
    "missing seed",
    "A resumed run does not restore the global random generators.",
    "trainers/checkpoints.py",
    "            if name in state_dict:",
    '            if name in state_dict and name != "random":',
    "trainers/test_checkpoint.py",
)
add(
    "resume with other batches",
    "trainers",
    "stale state",
    "A resumed run does not restore the generator of its replay buffer.",
    "trainers/checkpoints.py",
    '                generator.set_state(state["generator"].cpu())',
    "                pass",
    "trainers/test_trainer.py",
    "trainers/test_checkpoint.py",
)
add(
    "no evaluation at the end",
    "trainers",
    "skipped branch",
    "A run whose total is no multiple of eval_interval is not evaluated at its end.",
    "trainers/trainer.py",
    "return self.updates % self.eval_interval == 0 or self.updates == self.total_updates",
    "return self.updates % self.eval_interval == 0",
    "trainers/test_trainer.py",
)
add(
    "rows are means since the beginning",
    "trainers",
    "stale state",
    "The sums of metrics are not set to zero after a row.",
    "trainers/events.py",
    "            self.totals, self.counted = [], 0\n",
    "",
    "trainers/test_trainer.py",
)
add(
    "an equal score replaces the best",
    "trainers",
    "bound",
    "A later checkpoint with an equal score replaces the best one.",
    "trainers/events.py",
    "(self.best is not None and value <= self.best)",
    "(self.best is not None and value < self.best)",
    "trainers/test_progress.py",
    "trainers/test_trainer.py",
)
add(
    "infinite losses go on",
    "trainers",
    "bound",
    "Training ends at a loss that is nan, and goes on at one that is infinite.",
    "trainers/events.py",
    'if n.startswith("loss_") and not math.isfinite(v)]',
    'if n.startswith("loss_") and math.isnan(v)]',
    "trainers/test_progress.py",
    "trainers/test_trainer.py",
)
add(
    "other settings are resumed",
    "trainers",
    "omitted check",
    "A checkpoint of an agent with other settings is loaded without an error.",
    "trainers/checkpoints.py",
    "for name, v in values.items() if name not in may_change}",
    "for name, v in values.items() if name not in values}",
    "trainers/test_checkpoint.py",
)
add(
    "an interrupted run does not save",
    "trainers",
    "omitted write",
    "After Ctrl-C the updates since the last checkpoint are lost.",
    "trainers/trainer.py",
    "        if self._last_save != self.updates:",
    "        if self._last_save != self.updates and not self.interruption.requested:",
    "trainers/test_trainer.py",
)
add(
    "metrics are divided by calls",
    "trainers",
    "wrong denominator",
    "The sum of the metrics of calls that make several updates is divided by the number of calls.",
    "trainers/events.py",
    "        self.counted += updates",
    "        self.counted += 1",
    "trainers/test_trainer.py",
)
add(
    "another run's folder is taken",
    "trainers",
    "omitted check",
    "Training starts in a folder with the checkpoints of another run.",
    "trainers/run_folder.py",
    "            if not continues and (taken or self.best.exists()):",
    "            if False:",
    "trainers/test_trainer.py",
)
add(
    "unfinished evaluations are forgotten",
    "trainers",
    "stale state",
    "Evaluations in the background that had not finished are not repeated after a resume.",
    "trainers/checkpoints.py",
    '            self.evaluation.resubmit(state["pending"])',
    "            pass",
    "trainers/test_other_processes.py",
)
add(
    "targets move twice beside a hook",
    "trainers",
    "skipped branch",
    "TorchRL's target hook is called although the step moves the same targets.",
    "trainers/parts.py",
    'called = hook.target_params_updater is part_of(step, "target_updater")',
    "called = False",
    "trainers/test_torchrl_trainers.py",
)
add(
    "the oldest checkpoint is resumed",
    "checkpoint",
    "wrong index",
    "The first file of a folder of checkpoints is taken in place of the last one.",
    "files.py",
    "    return files[-1]",
    "    return files[0]",
    "trainers/test_trainer.py",
)
add(
    "checkpoints may run code",
    "checkpoint",
    "wrong default",
    "The states of a checkpoint are read with weights_only=False.",
    "files.py",
    "state = torch.load(path / self.filename, weights_only=True, map_location=map_location)",
    "state = torch.load(path / self.filename, weights_only=False, map_location=map_location)",
    "trainers/test_checkpoint.py",
)
add(
    "files are written in place",
    "files",
    "omitted write",
    "A file that must be written completely or not at all is written to its own name from the "
    "start.",
    "files.py",
    "            yield temporary\n            os.replace(temporary, path)",
    "            yield path",
    "trainers/test_checkpoint.py",
)

# -- config ----------------------------------------------------------------------------------------

add(
    "open intervals include their lower end",
    "config",
    "bound",
    "A setting that must be greater than 0 may be 0.",
    "config/knobs.py",
    '    above = value > low if interval[0] == "(" else value >= low',
    "    above = value >= low",
    "test_config.py",
)
add(
    "True is a whole number",
    "config",
    "omitted check",
    "A bool is accepted for a setting that is a whole number.",
    "config/knobs.py",
    "    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, accepted):",
    "    if not isinstance(value, accepted):",
    "test_config.py",
)
add(
    "missing settings become defaults",
    "config",
    "omitted check",
    "A config is made of a dict that lacks settings, without an error.",
    "config/iql_config.py",
    "        missing = [name for name in names if name not in values]",
    "        missing: list[str] = []",
    "test_config.py",
)
add(
    "default of the temperature",
    "config",
    "wrong default",
    "The default temperature is 10 in place of the paper's 3.",
    "config/iql_config.py",
    '        3.0,\n        "inverse temperature',
    '        10.0,\n        "inverse temperature',
    "test_config.py",
)
add(
    "deterministic policies with log_prob",
    "config",
    "omitted check",
    "A config with a deterministic policy and the objective log_prob is accepted.",
    "config/iql_config.py",
    '        if policy == "deterministic" and objective == "log_prob":',
    '        if policy == "deterministic" and objective == "none":',
    "test_config.py",
)
add(
    "none is text on the command line",
    "config",
    "skipped branch",
    "An option that may be none cannot be given as none.",
    "config/cli.py",
    "    if described.type is not type(None):",
    "    if described.type is not None:",
    "test_config.py",
)

# -- networks and their evaluation in updates ------------------------------------------------------

add(
    "layer norm before and after",
    "networks",
    "skipped branch",
    "With norm_after_activation there is a normalisation before the activation too.",
    "networks/perceptrons.py",
    "parts = parts[::-1] if norm_after_activation else parts",
    "parts = [*parts, nn.LayerNorm(width)] if norm_after_activation else parts",
    "networks/test_networks.py",
)
add(
    "gain of the initial weights",
    "networks",
    "wrong default",
    "Orthogonal weights have gain 1 in place of sqrt(2).",
    "networks/perceptrons.py",
    "nn.init.orthogonal_(layer.weight, 2.0**0.5)",
    "nn.init.orthogonal_(layer.weight, 1.0)",
    "networks/test_networks.py",
)
add(
    "constant columns are divided",
    "networks",
    "skipped branch",
    "A column of the observations that does not vary is divided by its tiny deviation.",
    "networks/perceptrons.py",
    'self.register_buffer("std", torch.where(constant, torch.ones_like(std), std))',
    'self.register_buffer("std", torch.where(std == 0, torch.ones_like(std), std))',
    "networks/test_networks.py",
)
add(
    "random shift never reaches the right end",
    "networks",
    "off by one",
    "Images are moved by -pixels to pixels - 1 in place of -pixels to pixels.",
    "networks/encoders.py",
    "(offset.reshape(-1, 2) * (2 * pixels + 1)).long()",
    "(offset.reshape(-1, 2) * (2 * pixels)).long()",
    "networks/test_networks.py",
)
add(
    "padding changes the LSTM's output",
    "networks",
    "skipped branch",
    "A padded step of a window changes the hidden state of the LSTM.",
    "networks/sequences.py",
    "            hidden = torch.where(real, out.sigmoid() * updated.tanh(), hidden)",
    "            hidden = out.sigmoid() * updated.tanh()",
    "networks/test_sequences.py",
)
add(
    "transformer sees the future",
    "networks",
    "sign",
    "A step of the transformer attends to itself and to later steps in place of earlier ones.",
    "networks/sequences.py",
    "        before = number.unsqueeze(-1) >= number",
    "        before = number.unsqueeze(-1) <= number",
    "networks/test_sequences.py",
)
add(
    "written-out gradient: mean of the bias",
    "networks",
    "wrong reduction",
    "The written-out gradient of a layer's bias is the mean over the batch in place of the sum.",
    "networks/evaluation.py",
    "                of_leaves[2 * i + 1] = gradient.sum(-2)",
    "                of_leaves[2 * i + 1] = gradient.mean(-2)",
    "networks/test_perceptron.py",
)
add(
    "written-out gradient: repeated categories",
    "networks",
    "omitted write",
    "The gradient of the column of a category counts one of the samples with that category in "
    "place of all.",
    "networks/evaluation.py",
    "    return torch.zeros_like(weight).scatter_add_(\n"
    "        -1, x.unsqueeze(-2).expand_as(gradient.mT), gradient.mT\n"
    "    )",
    "    return torch.zeros_like(weight).scatter_(\n"
    "        -1, x.unsqueeze(-2).expand_as(gradient.mT), gradient.mT\n"
    "    )",
    "networks/test_perceptron.py",
)
add(
    "written-out gradient: sum of the inputs' gradients",
    "networks",
    "wrong dimension",
    "The gradient that several critics send to one input is that of the first critic.",
    "networks/evaluation.py",
    "of_input if of_input.ndim == inputs[0].ndim else of_input.sum(0)",
    "of_input if of_input.ndim == inputs[0].ndim else of_input[0]",
    "networks/test_perceptron.py",
)
add(
    "detached critics learn in eager updates",
    "networks",
    "omitted detach",
    "In an eager update, critics through which a gradient only passes get a gradient of their "
    "parameters.",
    "networks/evaluation.py",
    "[leaf.detach() for leaf in self.leaves] if self.detached else self.leaves",
    "self.leaves",
    "losses/test_ddpg_bc.py",
    "networks/test_direct.py",
)

# -- policies --------------------------------------------------------------------------------------

add(
    "unbounded standard deviation",
    "policies",
    "bound",
    "The Gaussian policy's log-std is not limited to [-5, 2].",
    "policies/distributions.py",
    "        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * self.half_range\n"
    "        return self.inside(out)",
    "        std = log_std.exp() * self.half_range\n        return self.inside(out)",
    "test_policies.py",
)
add(
    "density: sign of the scale",
    "policies",
    "sign",
    "The logarithm of the Gaussian policy's density grows with the logarithm of its scale.",
    "policies/distributions.py",
    "-(0.5 * error.square() + normal.scale.log() + HALF_LOG_2PI)",
    "-(0.5 * error.square() - normal.scale.log() + HALF_LOG_2PI)",
    "test_policies.py",
)
add(
    "samples are not clipped",
    "policies",
    "bound",
    "Random actions of the Gaussian policy may lie outside of the bounds.",
    "policies/distributions.py",
    "        return _clip(x, self.low, self.high)",
    "        return x",
    "test_policies.py",
)
add(
    "masked actions are the allowed ones",
    "policies",
    "sign",
    "The categorical policy, of indices or one-hot actions, chooses among the actions that the "
    "mask forbids.",
    "policies/distributions.py",
    "logits.masked_fill(~mask, -torch.inf)",
    "logits.masked_fill(mask, -torch.inf)",
    "test_policies.py",
)
add(
    "best action by the most optimistic critic",
    "policies",
    "wrong reduction",
    "The best of several actions is chosen by the largest value over the critics in place of the "
    "smallest.",
    "policies/generative.py",
    "        return torch.stack([v.squeeze(-1) for v in values]).amin(0)",
    "        return torch.stack([v.squeeze(-1) for v in values]).amax(0)",
    "test_policies.py",
)
add(
    "flow: time of the end of each step",
    "policies",
    "off by one",
    "The Euler steps of a flow take the velocity at times 1/n, ..., 1 in place of 0, ..., (n-1)/n.",
    "policies/generative.py",
    "            time = torch.full_like(x[..., :1], number / self.num_steps)",
    "            time = torch.full_like(x[..., :1], (number + 1) / self.num_steps)",
    "losses/test_flow.py",
)
add(
    "bounds stay on their device and dtype",
    "policies",
    "stale state",
    "The bounds of a policy's distribution are not moved or cast with the policy.",
    "policies/distributions.py",
    "            self.limits[name] = fn(bound)",
    "            self.limits[name] = bound",
    "test_policies.py",
)

# -- functional ------------------------------------------------------------------------------------

add(
    "expectile: other side",
    "functional",
    "sign",
    "Predictions that are too high get the weight of those that are too low.",
    "functional.py",
    "    return (level - (error < 0).to(error.dtype)).abs()",
    "    return (level - (error > 0).to(error.dtype)).abs()",
    "test_functional.py",
)
add(
    "a value past the end may be nan",
    "functional",
    "omitted check",
    "Where an episode terminated the value of the next state is multiplied by 0, so that nan "
    "stays nan.",
    "functional.py",
    "    target = reward + gamma * next_value.masked_fill(terminated.bool(), 0.0)",
    "    target = reward + gamma * next_value * (~terminated.bool())",
    "test_functional.py",
)
add(
    "the exponent is not limited",
    "functional",
    "bound",
    "The exponent of the advantage's weight is not limited before exp, so that it may overflow.",
    "functional.py",
    "    weight = exponent.clamp(max=ceiling).exp()",
    "    weight = exponent.exp()",
    "test_functional.py",
)
add(
    "weighted mean over all samples",
    "functional",
    "wrong denominator",
    "The weighted mean is divided by the number of samples in place of the sum of the weights.",
    "functional.py",
    "    total = _sum(weight, dim)\n    return",
    "    total = _sum(torch.ones_like(weight), dim)\n    return",
    "test_functional.py",
)
add(
    "effective sample size of masked samples",
    "functional",
    "omitted check",
    "The effective sample size counts masked samples.",
    "functional.py",
    "    weight, _ = _unmasked(weight, mask, None)\n",
    "",
    "test_functional.py",
    "population/test_population_loss.py",
    "losses/test_objectives.py",
)
add(
    "flow: direction of the velocity",
    "functional",
    "sign",
    "The velocity of flow matching points from the action to the noise.",
    "functional.py",
    "    velocity = action - noise\n    return noise + time",
    "    velocity = noise - action\n    return noise - time",
    "losses/test_flow.py",
    "test_functional.py",
)

# -- distributed -----------------------------------------------------------------------------------

add(
    "gradients are not summed over ranks",
    "distributed",
    "omitted call",
    "An update of several ranks descends on each rank's own gradients.",
    "update/step.py",
    "gradients = self.ranks.sum_each(gradients)",
    "pass",
    "distributed/test_data_parallel.py",
)
add(
    "shares of means by the number of ranks",
    "distributed",
    "wrong denominator",
    "A rank's part of a mean is weighted by 1 / ranks in place of its share of the valid steps' "
    "weights.",
    "update/divided.py",
    "return loss * self._of_weights.to(loss) if",
    "return loss / self._ranks.size if",
    "distributed/test_data_parallel.py",
)
add(
    "ranks keep their own weights",
    "distributed",
    "omitted call",
    "data_parallel does not give all ranks the parameters of rank 0.",
    "distributed.py",
    "            tensor.copy_(values)\n",
    "            pass\n",
    "distributed/test_data_parallel.py",
)
add(
    "ranks draw different numbers",
    "distributed",
    "missing seed",
    "data_parallel does not give all ranks the state of rank 0's random generators.",
    "distributed.py",
    "    ranks.share_random_state()\n    plain.ranks = ranks",
    "    plain.ranks = ranks",
    "distributed/test_data_parallel.py",
)
