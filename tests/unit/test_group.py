"""Where processes of a cut model meet."""

from weft.serve.cut.group import Meeting


def test_meetings_have_the_lowest_free_name_in_folders_of_their_own() -> None:
    """Compiled code knows a group by its name: whoever starts again finds it by the same one."""
    one, two = Meeting(), Meeting()
    assert one.store.name != two.store.name
    assert one.store.parent != two.store.parent
    name, folder = one.store.name, one.store.parent
    one.close()
    assert not folder.exists()
    again = Meeting()
    assert again.store.name == name
    for meeting in (two, again):
        meeting.close()
