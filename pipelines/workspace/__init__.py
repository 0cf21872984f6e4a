"""The workspace: immutable, versioned, hash-linked artifacts. Never imports torch.

    <root>/<stage>/<NNNN>/manifest.json     a complete artifact; without a manifest there is none
    <root>/<stage>/.draft-<key>/            a run under way or interrupted: draft.json, out/ (final files), work/, owner
    <root>/<stage>/.gone-<name>/            what was being removed; the next run of the stage, or `hqdm gc`, ends that
    <root>/<stage>/.current                 the number of the artifact that was asked for last
    <root>/<stage>/.lock                    shared with flock by all runs, held alone by what removes artifacts

A run holds its draft's `owner` with flock; the kernel drops locks with the process.

A commit hashes and syncs every file, writes the manifest last and renames out/ to its number, so that a reader sees the
whole artifact or none of it; what goes is renamed before it is deleted. Nothing is inferred from the name of a file.
manifest.json and draft.json end with a seal, a hash of the rest of them.

seals.py: hashes, and JSON with a seal; machine.py: where and when something was made; disks.py: what disks do to those
who write; artifacts.py: manifests and their files; locks.py: who is at work; drafts.py: runs under way; store.py: all
of it. Each imports only from those before it.
"""
