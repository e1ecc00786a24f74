from loupe.summary import describe_data, describe_task, format_markdown, print_summary

SUMMARY = {
    "data/name": "tiles",
    "data/num_images": 790,
    "data/layout": "mvtec",
    "data/num_quarantined": 2,
    "classifier/not_trained_because": "there is one class to train on (good)",
    "detector/test/image_auroc": 0.91234,
    "detector/test/num_images": 490,
    "detector/train/num_images": 240,
    "detector/model": "tiles-detector",
    "detector/version": "3",
    "detector/champion_version": "2",
    "detector/reason": "image_auroc 0.9123 is not above the champion's 0.9200 on the same images",
}


def test_what_was_not_trained_says_why():
    assert describe_task(SUMMARY, "classifier") == {"trained": "no: there is one class to train on (good)"}


def test_what_was_trained_has_figures_champion_and_reason():
    told = describe_task(SUMMARY, "detector")
    assert told["figures"] == "image_auroc 0.9123"
    assert told["champion"] == "version 2 of tiles-detector"
    assert told["because"].startswith("version 3: image_auroc 0.9123 is not above")


def test_a_figure_with_an_interval_is_followed_by_it():
    figures = {"classifier/test/accuracy": 0.925, "classifier/test/accuracy_low": 0.91, "classifier/test/log_loss": 0.2}
    told = describe_task(
        {
            **figures,
            "classifier/test/accuracy_high": 0.94,
            "classifier/train/num_images": 90,
            "classifier/test/num_images": 40,
            "classifier/model": "tiles-classifier",
            "classifier/version": "1",
            "classifier/champion_version": None,
            "classifier/reason": "accuracy 0.925 passes the floor",
        },
        "classifier",
    )
    assert told["figures"] == "accuracy 0.9250 (0.9100 to 0.9400)\nlog_loss 0.2000"


def test_data_set_is_one_line():
    assert describe_data(SUMMARY) == "tiles: 790 images in the layout mvtec, 2 files set aside"


def test_labels_are_printed_as_they_are(capsys):
    print_summary({**SUMMARY, "data/name": "[/a]", "detector/reason": "its figure of [/red] is low"})
    told = " ".join(capsys.readouterr().out.split())
    assert "[/a]: 790" in told
    assert "[/red]" in told


def test_markdown_has_both_kinds():
    page = format_markdown(SUMMARY)
    assert "## classifier" in page
    assert "image_auroc 0.9123" in page
