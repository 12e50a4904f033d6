"""Tables and text as the experiments write them."""

from experiments.harness.reports.markdown import blocks, spans


def test_a_table_has_a_head_and_rows():
    text = "Bits/dim ± its error:\n\n| Σ_θ | T = 10 |\n| --- | --- |\n| β | **3.5** ± 0.1 |\n"
    paragraph, table = blocks(text)
    assert paragraph.spans == [("", "Bits/dim ± its error:")]
    assert table.head == [[("", "Σ_θ")], [("", "T = 10")]]
    assert table.rows == [[[("", "β")], [("strong", "3.5"), ("", " ± 0.1")]]]


def test_an_empty_cell_stays_a_cell_and_an_escaped_bar_is_text():
    (table,) = blocks("| a | b | c |\n|---|:-:|---|\n| x \\| y | | z |")
    assert table.rows == [[[("", "x | y")], [], [("", "z")]]]


def test_lines_of_a_paragraph_are_one_and_headings_and_items_are_their_own():
    kinds = [(block.kind, block.spans[0][1]) for block in blocks("# A\none\ntwo\n\n- item\nthree")]
    assert kinds == [
        ("heading", "A"),
        ("paragraph", "one two"),
        ("item", "item"),
        ("paragraph", "three"),
    ]


def test_tags_and_entities_are_text():
    assert spans("&lt;b&gt; <b> `<i>`") == [("", "<b> <b> "), ("code", "<i>")]
    assert spans("[name](http://example.org/x.png)") == [("", "name")]


def test_stars_around_words_mark_them():
    text = "*Lower* and **higher**: 2 * 3 * 4, a*b*c, \\*no\\*"
    assert spans(text) == [
        ("em", "Lower"),
        ("", " and "),
        ("strong", "higher"),
        ("", ": 2 * 3 * 4, a*b*c, *no*"),
    ]


def test_stray_marks_are_text():
    assert spans("2 ** 3 `") == [("", "2 ** 3 `")]
    assert blocks("") == []
    assert blocks("|")[0].kind == "table"
