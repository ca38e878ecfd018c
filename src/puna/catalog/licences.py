"""The Llama community licences as facts: what each asks of those who use or pass on a model.

Clause numbers are those of the agreements that Meta publishes with llama-models at a9c89c4. This is a summary
for people who have to decide something, no legal advice, and it does not hold the full texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

MAU_LIMIT = 700_000_000
"""Above this many monthly active users a separate licence from Meta is needed (clause 2).

It is measured once, in the calendar month before the release date of the version: no limit on later growth.
"""


@dataclass(frozen=True, kw_only=True)
class Licence:
    """Hold what one version of the licence asks."""

    key: str  # the id that Hugging Face model cards use
    family: str  # "Llama 3.1"
    title: str
    version_date: date
    display_text: str | None  # to show where a product is built on it (1.b.i(B))
    name_prefix: str | None  # with which the name of a distributed derivative model starts (1.b.i(B))
    naming_covers_outputs: bool  # the naming rule also holds for models trained on outputs
    outputs_may_train_other_models: bool  # False: clause 1.b.v forbids it
    excludes_eu_for_multimodal: bool  # a rule of the acceptable use policy
    applies_eu_exclusion: bool  # whether a model of this version is multimodal, so that the rule has effect
    notice: str  # the line of the "Notice" file that copies carry (1.b.iii)

    @property
    def redistribution(self) -> bool:
        """Return True: every version lets the weights be used, changed and passed on under its conditions."""
        return True

    def duties(self, *, distributes_model: bool) -> list[str]:
        """Return what a licensee who passes the model (or a derivative) on has to do, one sentence each.

        With `distributes_model` False only the duties of a product built on it are listed.
        """
        duties = ["Follow the acceptable use policy."]
        if self.display_text:
            duties.append(f'Show "{self.display_text}" on a website, interface, about page or documentation.')
        if distributes_model:
            duties.append("Pass on a copy of the licence agreement.")
            duties.append(f'Add a text file "Notice" with the line: {self.notice}')
        if distributes_model and self.name_prefix:
            duties.append(f'Start the name of the model with "{self.name_prefix}".')
        if not self.outputs_may_train_other_models:
            duties.append(f"Do not use outputs to improve any other language model than {self.family}.")
        return duties


def _notice(product: str, licence: str, sign: str = "\u00a9") -> str:
    holder = f"Copyright {sign} Meta Platforms, Inc. All Rights Reserved."
    return f"{product} is licensed under the {licence}, {holder}"


def _from_3_1(version: str, version_date: date, *, eu: bool, multimodal: bool) -> Licence:
    product = f"Llama {version}"
    return Licence(
        key=f"llama{version}",
        family=product,
        title=f"LLAMA {version} COMMUNITY LICENSE AGREEMENT",
        version_date=version_date,
        display_text="Built with Llama",
        name_prefix="Llama",
        naming_covers_outputs=True,
        outputs_may_train_other_models=True,
        excludes_eu_for_multimodal=eu,
        applies_eu_exclusion=multimodal,
        notice=_notice(product, f"{product} Community License"),
    )


_ALL = (
    Licence(
        key="llama2",
        family="Llama 2",
        title="LLAMA 2 COMMUNITY LICENSE AGREEMENT",
        version_date=date(2023, 7, 18),
        display_text=None,
        name_prefix=None,
        naming_covers_outputs=False,
        outputs_may_train_other_models=False,
        excludes_eu_for_multimodal=False,
        applies_eu_exclusion=False,
        notice=_notice("Llama 2", "LLAMA 2 Community License", "(c)"),
    ),
    Licence(
        key="llama3",
        family="Llama 3",
        title="META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
        version_date=date(2024, 4, 18),
        display_text="Built with Meta Llama 3",
        name_prefix="Llama 3",
        naming_covers_outputs=False,
        outputs_may_train_other_models=False,
        excludes_eu_for_multimodal=False,
        applies_eu_exclusion=False,
        notice=_notice("Meta Llama 3", "Meta Llama 3 Community License"),
    ),
    _from_3_1("3.1", date(2024, 7, 23), eu=False, multimodal=False),
    _from_3_1("3.2", date(2024, 9, 25), eu=True, multimodal=True),  # 11B and 90B Vision
    _from_3_1("3.3", date(2024, 12, 6), eu=True, multimodal=False),
    _from_3_1("4", date(2025, 4, 5), eu=True, multimodal=True),
)

LICENCES: dict[str, Licence] = {licence.key: licence for licence in _ALL}
