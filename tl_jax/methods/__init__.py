"""How to adapt: rules choose what trains, terms what is minimised; both are data for one trainer."""

from collections.abc import Callable

from tl_jax.methods import contrastive, distill, distill_features, domain, penalties
from tl_jax.methods.term import TASK, Term, make_task_term

# The terms that config.terms can name: functions of annotated arguments.
TERMS: dict[str, Callable[..., Term]] = {
    TASK: make_task_term,
    **penalties.PENALTIES,
    **distill.TERMS,
    **distill_features.TERMS,
    "contrastive": contrastive.contrastive,
    **domain.TERMS,
}
