"""The licence facts that people get wrong, one by one."""

from __future__ import annotations

from datetime import date

from puna.catalog.licences import LICENCES, MAU_LIMIT


def test_outputs_may_train_other_models_from_3_1_on() -> None:
    allowed = {key for key, licence in LICENCES.items() if licence.outputs_may_train_other_models}
    assert allowed == {"llama3.1", "llama3.2", "llama3.3", "llama4"}


def test_display_text_and_name_prefix() -> None:
    assert LICENCES["llama2"].display_text is None
    assert LICENCES["llama2"].name_prefix is None
    assert LICENCES["llama3"].display_text == "Built with Meta Llama 3"
    assert LICENCES["llama3"].name_prefix == "Llama 3"
    assert LICENCES["llama4"].display_text == "Built with Llama"
    assert LICENCES["llama3.3"].name_prefix == "Llama"


def test_eu_exclusion_bites_only_where_a_multimodal_model_exists() -> None:
    assert {k for k, v in LICENCES.items() if v.excludes_eu_for_multimodal} == {
        "llama3.2",
        "llama3.3",
        "llama4",
    }
    assert {k for k, v in LICENCES.items() if v.applies_eu_exclusion} == {"llama3.2", "llama4"}


def test_notice_lines() -> None:
    assert LICENCES["llama2"].notice == (
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )
    assert LICENCES["llama3.1"].notice == (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, "
        "Copyright \u00a9 Meta Platforms, Inc. All Rights Reserved."
    )


def test_duties_of_someone_who_passes_a_model_on() -> None:
    assert LICENCES["llama2"].duties(distributes_model=False) == [
        "Follow the acceptable use policy.",
        "Do not use outputs to improve any other language model than Llama 2.",
    ]
    duties = LICENCES["llama3.3"].duties(distributes_model=True)
    assert 'Start the name of the model with "Llama".' in duties
    assert "Pass on a copy of the licence agreement." in duties
    assert len(duties) == 5


def test_versions_and_limit() -> None:
    assert MAU_LIMIT == 700_000_000
    assert LICENCES["llama4"].version_date == date(2025, 4, 5)
    assert LICENCES["llama4"].title == "LLAMA 4 COMMUNITY LICENSE AGREEMENT"
